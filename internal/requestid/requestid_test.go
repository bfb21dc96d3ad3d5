package requestid_test

import (
	"regexp"
	"testing"

	"countersign/internal/requestid"
)

// TestForm makes ids, and sees the form of docs/SPEC.md and no id twice.
func TestForm(t *testing.T) {
	form, seen := regexp.MustCompile(`^[a-z2-7]{16}$`), map[string]bool{}
	for range 10_000 {
		id := requestid.New()
		if !form.MatchString(id) || seen[id] {
			t.Fatalf("%q has another form, or comes twice", id)
		}
		seen[id] = true
		if item := requestid.Item(id, 31); item != id+".31" {
			t.Fatalf("the item is %q", item)
		}
	}
}

// BenchmarkNew is the cost of an id for each request.
func BenchmarkNew(b *testing.B) {
	for b.Loop() {
		requestid.New()
	}
}
