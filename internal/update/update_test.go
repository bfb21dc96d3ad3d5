package update_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"countersign/internal/update"
)

// release makes the keys of releases with ssh-keygen, and a file that two of them have signed.
func release(t *testing.T) (file []byte, keys update.Keys) {
	t.Helper()
	dir := t.TempDir()
	text := "needed 2\n"
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("ssh-keygen", append([]string{"-q"}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen %v: %v %s", args, err, out)
		}
	}
	image := bytes.Repeat([]byte("image"), 100)
	sum := sha256.Sum256(image)
	m := update.Manifest{Version: "0.3.0", Variant: "vm", Rollback: 2, Size: int64(len(image)),
		SHA256: hex.EncodeToString(sum[:])}
	var signatures []string
	for _, name := range []string{"a", "b", "c"} {
		path := filepath.Join(dir, name)
		run("-t", "ed25519", "-N", "", "-f", path)
		public, err := os.ReadFile(path + ".pub")
		if err != nil {
			t.Fatal(err)
		}
		text += string(public)
		if name == "c" {
			continue
		}
		manifest := path + ".manifest"
		if err := os.WriteFile(manifest, []byte(m.Text()), 0o600); err != nil {
			t.Fatal(err)
		}
		run("-Y", "sign", "-n", update.Namespace, "-f", path, manifest)
		signature, err := os.ReadFile(manifest + ".sig")
		if err != nil {
			t.Fatal(err)
		}
		signatures = append(signatures, string(signature))
	}
	keys, err := update.ParseKeys(text)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := update.Write(&b, m, signatures, bytes.NewReader(image)); err != nil {
		t.Fatal(err)
	}
	return b.Bytes(), keys
}

// accept reads a file as the machine does.
func accept(file []byte, keys update.Keys) ([]byte, error) {
	f, err := update.Open(bytes.NewReader(file), keys)
	if err != nil {
		return nil, err
	}
	var image bytes.Buffer
	err = f.CopyImage(&image)
	return image.Bytes(), err
}

// TestEveryByteOfAnUpdateCounts changes each byte, and cuts the file at each length: no other image
// comes out than the signed one.
func TestEveryByteOfAnUpdateCounts(t *testing.T) {
	file, keys := release(t)
	image, err := accept(file, keys)
	if err != nil || len(image) != 500 {
		t.Fatalf("%d bytes, %v", len(image), err)
	}
	refused := 0
	for i := range file {
		changed := bytes.Clone(file)
		changed[i] ^= 0x41
		if got, err := accept(changed, keys); err != nil {
			refused++
		} else if !bytes.Equal(got, image) { // the padding of tar, and texts around a signature
			t.Fatalf("byte %d: another image is accepted", i)
		}
		if got, err := accept(file[:i], keys); err == nil && !bytes.Equal(got, image) {
			t.Fatalf("%d bytes: another image is accepted", i)
		}
	}
	if refused < len(image)+200 {
		t.Errorf("only %d changes are refused", refused)
	}
}

// TestKeys refuses lists of keys that can't be.
func TestKeys(t *testing.T) {
	_, keys := release(t)
	key := keys.Keys[0].PublicKey
	for text, want := range map[string]string{
		"":                              "of 0 keys, 0 would be needed",
		key:                             "of 1 keys, 0 would be needed",
		"needed 2\n" + key:              "of 1 keys, 2 would be needed",
		"needed 0\n" + key:              "is no number",
		"needed 1\nneeded 1\n" + key:    "SSH key",
		"needed 1\n" + key + "\n" + key: "there twice",
		"needed 1\nssh-rsa AAAA":        "SSH key",
	} {
		if _, err := update.ParseKeys(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// TestManifests refuses texts in another form, and values that can't be.
func TestManifests(t *testing.T) {
	good := update.Manifest{Version: "0.3.0", Variant: "vm", Rollback: 1, Size: 1, SHA256: strings.Repeat("0a", 32)}
	if m, err := update.ParseManifest(good.Text()); err != nil || m != good {
		t.Fatalf("%+v, %v", m, err)
	}
	for name, text := range map[string]string{
		"an end of line more":  good.Text() + "\n",
		"a line more":          good.Text() + "x: y\n",
		"a leading zero":       strings.Replace(good.Text(), "size: 1", "size: 01", 1),
		"version 0.3":          strings.Replace(good.Text(), "0.3.0", "0.3", 1),
		"a path as version":    strings.Replace(good.Text(), "0.3.0", "../0.3.0", 1),
		"rollback version 0":   strings.Replace(good.Text(), "rollback version: 1", "rollback version: 0", 1),
		"size 0":               strings.Replace(good.Text(), "size: 1", "size: 0", 1),
		"a size above the max": strings.Replace(good.Text(), "size: 1", "size: 536870913", 1),
		"capital hex":          strings.Replace(good.Text(), "0a", "0A", 1),
	} {
		if _, err := update.ParseManifest(text); !errors.Is(err, update.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	err := update.Write(io.Discard, update.Manifest{}, nil, strings.NewReader(""))
	if !errors.Is(err, update.ErrInvalid) {
		t.Error(err)
	}
}
