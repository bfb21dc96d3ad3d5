package scantest

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestMain(m *testing.M) { os.Exit(Run(m)) }

// TestScannerFindsSecrets writes secrets of each kind in each way, and has each found, also where
// the secret is noted behind the output.
func TestScannerFindsSecrets(t *testing.T) {
	dir := t.TempDir()
	private, seed := bytes.Repeat([]byte{1, 0xfa}, 16), []byte(strings.Repeat("seed", 8))
	token, url := strings.Repeat("tokeN", 8)+"abc", "a&b+url-secret"
	if err := os.Mkdir(filepath.Join(dir, "ann.run"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"pin": "a-pin-of-the-scanner\n", "shop.key": fmt.Sprintf("# public key: %x\n%x\n", make([]byte, 32), private),
		"seed": string(seed), "ann.run/session": `{"token":"` + token + `"}`, "mail-password": "correct horse\n",
		"headers": "X-Tenant: tenant-of-the-scanner\nAuthorization: Bearer collectors-token\n",
		"a.toml":  "[[webhooks]]\nurl = \"https://ops.example/hook?t=a%26b%2Burl-secret\"\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	texts := []string{
		"a-pin-of-the-scanner", fmt.Sprintf("%x", private), fmt.Sprintf("%X", private), fmt.Sprint(private),
		base64.StdEncoding.EncodeToString(private), base64.RawURLEncoding.EncodeToString(private),
		string(seed), token, fmt.Sprintf("% x", private), percent([]byte("a-pin-of-the-scanner")), "correct horse",
		"correct+horse", "collectors-token", url, "a%26b%2Burl-secret", `a\u0026b+url-secret`,
		base64.StdEncoding.EncodeToString([]byte("\x00user\x00correct horse")), fmt.Sprintf("%#v", private),
		base64.StdEncoding.EncodeToString([]byte("1:a-pin-of-the-scanner")),
		strings.ReplaceAll(fmt.Sprint(private), " ", ","),
	}
	for i, text := range texts {
		Saw(fmt.Sprint("output ", i), "before "+text+" after")
	}
	Saw("the last output", fmt.Sprintf("the public key %x, https://ops.example/hook", make([]byte, 32)))
	if err := SecretFiles(dir); err != nil {
		t.Fatal(err)
	}
	found := strings.Join(process.search(), "\n")
	for i, text := range texts {
		if !strings.Contains(found, fmt.Sprint("output ", i, " has ")) {
			t.Errorf("%s was not found", text)
		}
	}
	if strings.Contains(found, "the last output") {
		t.Errorf("a public key and a URL are secrets: %s", found)
	}
	if found := process.search(); len(found) > 0 {
		t.Errorf("found twice: %q", found)
	}
}

// TestManyOutputs: outputs beyond the bound are searched before the end, and what is found is not
// forgotten.
func TestManyOutputs(t *testing.T) {
	Secret("the secret of many", []byte("secret-of-many"))
	large := strings.Repeat("x", enough/2)
	Saw("the first", large+"secret-of-many")
	Saw("the second", large)
	if len(process.outputs) > 0 {
		t.Error("the outputs are kept")
	}
	if found := process.search(); len(found) != 1 || !strings.HasPrefix(found[0], "the first has the secret of many") {
		t.Errorf("%q", found)
	}
}

// TestExceptions: the salt of a receipt is a secret but in the peer's answer, that of a decision
// but in the ledger and in decisions, and the token of a session but in the answer to the sign-in.
func TestExceptions(t *testing.T) {
	const receipt, decision = "8bci6OIzcb0WDonjbVVtOQ", "00112233445566778899aabbccddeeff"
	session, cookie := strings.Repeat("Token", 8)+"abc", strings.Repeat("Cooki", 8)+"xyz"
	file := filepath.Join(t.TempDir(), "ledger.db")
	if err := os.WriteFile(file, []byte(`....{"rules":null,"salt":"`+decision+`"}....`), 0o600); err != nil {
		t.Fatal(err)
	}
	answers := Answers(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/v1/sessions":
			w.Header().Set("Set-Cookie", "__Host-countersign="+cookie+"; Path=/")
			fmt.Fprintf(w, `{"token":%q}`, session)
		default:
			fmt.Fprintf(w, "%s %s %s", decision, session, cookie)
		}
	}))
	for _, target := range []string{"/v1/sessions", "/v1/decisions/7", "/v1/state"} {
		method := http.MethodGet
		if target == "/v1/sessions" {
			method = http.MethodPost
		}
		answers.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(method, target, nil))
	}
	SawPeer("the answer", `{"receipt":{"id":"sWTyBkj3gzA26doA4pywWw","salt":"`+receipt+`"}}`)
	SawLedger(file)
	Log().Info("a salt", "salt", receipt)
	var got []string
	for _, found := range process.search() {
		name, _, _ := strings.Cut(found, " behind ")
		got = append(got, name)
	}
	want := []string{
		"the answer to GET /v1/decisions/7 has the token of a session",
		"the answer to GET /v1/state has the salt of a decision",
		"the answer to GET /v1/state has the token of a session",
		"the log has the salt of a receipt",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
