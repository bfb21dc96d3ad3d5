package noise

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

// TestIdentityIsNotPrinted prints an identity by each verb of fmt, as JSON, and in lines of the
// log: by itself, and in a struct. The private key is not found.
func TestIdentityIsNotPrinted(t *testing.T) {
	id, err := NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	private := id.Private()
	var out strings.Builder
	type config struct {
		Identity *Identity
		value    Identity
	}
	for _, v := range []any{id, *id, config{id, *id}, &config{id, *id}, []*Identity{id}} {
		for verb := byte('A'); verb <= 'z'; verb++ {
			for _, flag := range []string{"", "+", "#", " "} {
				fmt.Fprintf(&out, "%"+flag+string(verb)+"\n", v)
			}
		}
		b, err := json.Marshal(v)
		fmt.Fprintf(&out, "%s %v\n", b, err)
		for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
			slog.New(h).Info("m", "identity", v)
		}
	}
	list := strings.Trim(fmt.Sprint(private), "[]")
	for _, form := range []string{
		string(private), fmt.Sprintf("%x", private), fmt.Sprintf("%X", private), fmt.Sprintf("% x", private),
		base64.StdEncoding.EncodeToString(private), list, strings.ReplaceAll(list, " ", ","),
		strings.Trim(fmt.Sprintf("%#v", private)[len("[]byte"):], "{}"),
	} {
		if strings.Contains(out.String(), form) {
			t.Errorf("the private key is printed as %q", form)
		}
	}
}
