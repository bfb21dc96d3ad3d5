package image

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign/internal/durable"
)

// Package is a Debian package of the lock file.
type Package struct {
	Name, Version string
	Path          string // below a mirror, such as pool/main/c/chrony/chrony_4.3-2_amd64.deb
	Size          int64
	SHA256        string // hex
}

// Lock is the lock file: all Debian packages of the images, each with its version and its hash.
type Lock struct {
	// Snapshot is the time of the lock in the form of snapshot.debian.org, which keeps the packages
	// that the mirrors drop.
	Snapshot string
	Packages []Package
}

// ReadLock reads a lock file: a line "snapshot TIME", and a line for each package with name,
// version, path, size in bytes and SHA-256.
func ReadLock(path string) (l Lock, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return l, err
	}
	n := 0
	for line := range strings.Lines(string(b)) {
		n++
		f := strings.Fields(line)
		switch {
		case len(f) == 0 || strings.HasPrefix(f[0], "#"):
		case len(f) == 2 && f[0] == "snapshot":
			l.Snapshot = f[1]
		case len(f) == 5:
			size, err := strconv.ParseInt(f[3], 10, 64)
			if hash, bad := hex.DecodeString(f[4]); err != nil || bad != nil || len(hash) != sha256.Size {
				return l, fmt.Errorf("%s:%d: no size or no SHA-256", path, n)
			}
			l.Packages = append(l.Packages, Package{f[0], f[1], f[2], size, f[4]})
		default:
			return l, fmt.Errorf("%s:%d: %q is no line of a lock file", path, n, strings.TrimSpace(line))
		}
	}
	return l, nil
}

// Write writes the lock file.
func (l Lock) Write(path string) error {
	var b strings.Builder
	b.WriteString("# The Debian packages of the images: name, version, path, bytes, SHA-256.\n" +
		"# Made by go run ./image/build lock.\n")
	fmt.Fprintf(&b, "snapshot %s\n", l.Snapshot)
	for _, p := range l.Packages {
		fmt.Fprintf(&b, "%s %s %s %d %s\n", p.Name, p.Version, p.Path, p.Size, p.SHA256)
	}
	return durable.Replace(path, []byte(b.String()), 0o644)
}

// Find returns a package of the lock file.
func (l Lock) Find(name string) (Package, error) {
	i := slices.IndexFunc(l.Packages, func(p Package) bool { return p.Name == name })
	if i < 0 {
		return Package{}, fmt.Errorf("the lock file has no package %s", name)
	}
	return l.Packages[i], nil
}

// Mirrors are the places of Debian's archives, by the first part of their names.
type Mirrors struct{ Debian, Security string }

// DefaultMirrors are Debian's own. Packages have their hashes in the lock file, so that plain HTTP
// is no danger.
var DefaultMirrors = Mirrors{"http://deb.debian.org/debian", "http://deb.debian.org/debian-security"}

// Suites of the lock.
var suites = []struct {
	name, component string
	only            string // prefix of the packages that are taken
}{
	{"bookworm", "main", ""}, {"bookworm-updates", "main", ""}, {"bookworm-security", "main", ""},
	{"bookworm", "non-free-firmware", ""}, {"bookworm-security", "non-free-firmware", ""},
	// Landlock of Linux 6.1 confines neither TCP nor truncation.
	{"bookworm-backports", "main", "linux-image-"},
}

// MakeLock finds the newest version of each package in Debian 12. keyring is the path of Debian's
// archive keys.
func MakeLock(ctx context.Context, m Mirrors, keyring string, names []string) (l Lock, err error) {
	found := map[string]Package{}
	for _, s := range suites {
		base := m.Debian
		if strings.HasSuffix(s.name, "-security") {
			base = m.Security
		}
		index, err := packageIndex(ctx, base, s.name, s.component, keyring)
		if err != nil {
			return l, fmt.Errorf("%s %s: %w", s.name, s.component, err)
		}
		for _, p := range index {
			if !strings.HasPrefix(p.Name, s.only) {
				continue
			}
			old, is := found[p.Name]
			if is && !newer(p.Version, old.Version) {
				continue
			}
			if base == m.Security {
				p.Path = "security/" + p.Path
			}
			found[p.Name] = p
		}
	}
	for _, name := range names {
		p, is := found[name]
		if !is {
			return l, fmt.Errorf("there is no package %s in Debian", name)
		}
		l.Packages = append(l.Packages, p)
	}
	slices.SortFunc(l.Packages, func(a, b Package) int { return strings.Compare(a.Name, b.Name) })
	l.Packages = slices.Compact(l.Packages)
	l.Snapshot = time.Now().UTC().Format("20060102T150405Z")
	return l, nil
}

// newer compares versions as dpkg does.
func newer(a, b string) bool {
	return exec.Command("dpkg", "--compare-versions", a, "gt", b).Run() == nil
}

// packageIndex returns the packages of a suite, whose release file Debian has signed.
func packageIndex(ctx context.Context, base, suite, component, keyring string) (all []Package, err error) {
	signed, err := get(ctx, base+"/dists/"+suite+"/InRelease")
	if err != nil {
		return nil, err
	}
	verify := exec.CommandContext(ctx, "gpgv", "--quiet", "--keyring", keyring, "--output", "-")
	verify.Stdin = bytes.NewReader(signed)
	var complaints bytes.Buffer
	verify.Stderr = &complaints
	release, err := verify.Output()
	if err != nil {
		return nil, fmt.Errorf("InRelease is not signed by Debian: %w: %s", err, complaints.String())
	}
	name := component + "/binary-amd64/Packages.xz"
	_, sums, _ := strings.Cut(string(release), "\nSHA256:\n")
	var want string
	for line := range strings.Lines(sums) {
		if !strings.HasPrefix(line, " ") {
			break
		}
		if f := strings.Fields(line); len(f) == 3 && f[2] == name {
			want = f[0]
		}
	}
	if want == "" {
		return nil, fmt.Errorf("InRelease has no SHA-256 of %s", name)
	}
	xz, err := get(ctx, base+"/dists/"+suite+"/"+name)
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(xz); hex.EncodeToString(sum[:]) != want {
		return nil, fmt.Errorf("%s has another SHA-256 than InRelease says; try again", name)
	}
	unpack := exec.CommandContext(ctx, "xz", "-dc")
	unpack.Stdin = bytes.NewReader(xz)
	text, err := unpack.Output()
	if err != nil {
		return nil, fmt.Errorf("xz: %w", err)
	}
	return parseIndex(text)
}

func parseIndex(text []byte) (all []Package, err error) {
	var p Package
	lines := bufio.NewScanner(bytes.NewReader(append(text, '\n')))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ": ")
		switch name {
		case "":
			if p.Name != "" {
				all = append(all, p)
			}
			p = Package{}
		case "Package":
			p.Name = value
		case "Version":
			p.Version = value
		case "Filename":
			p.Path = value
		case "Size":
			if p.Size, err = strconv.ParseInt(value, 10, 64); err != nil {
				return nil, err
			}
		case "SHA256":
			p.SHA256 = value
		}
	}
	return all, lines.Err()
}

func get(ctx context.Context, url string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", url, answer.Status)
	}
	return io.ReadAll(answer.Body)
}

// Fetch returns the path of a package in the folder cache, and gets the package first if the folder
// has none with the right hash.
func (l Lock) Fetch(ctx context.Context, m Mirrors, cache string, p Package) (string, error) {
	path := filepath.Join(cache, p.SHA256+".deb")
	if b, err := os.ReadFile(path); err == nil && p.is(b) {
		return path, nil
	}
	where, archive := m.Debian, "debian"
	rest, security := strings.CutPrefix(p.Path, "security/")
	if security {
		where, archive = m.Security, "debian-security"
	}
	var errs []error
	for _, base := range []string{where, "http://snapshot.debian.org/archive/" + archive + "/" + l.Snapshot} {
		b, err := get(ctx, base+"/"+rest)
		if err == nil && !p.is(b) {
			err = fmt.Errorf("%s/%s is not the package of the lock file", base, rest)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if err := os.MkdirAll(cache, 0o755); err != nil {
			return "", err
		}
		return path, durable.Replace(path, b, 0o644)
	}
	return "", fmt.Errorf("%s %s: %w", p.Name, p.Version, errors.Join(errs...))
}

func (p Package) is(b []byte) bool {
	sum := sha256.Sum256(b)
	return int64(len(b)) == p.Size && hex.EncodeToString(sum[:]) == p.SHA256
}
