package durable

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// TestPaced writes parts of all sizes around the pace. The file has them all, and an error of the
// file is an error of Write.
func TestPaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	p := &Paced{File: f}
	random := rand.New(rand.NewPCG(1, 2))
	var want bytes.Buffer
	for _, size := range []int{0, 1, paceBytes - 2, 1, 1, paceBytes, paceBytes + 1, 3*paceBytes + 7} {
		part := make([]byte, size)
		for i := range part {
			part[i] = byte(random.Uint32())
		}
		want.Write(part)
		if n, err := p.Write(part); n != size || err != nil {
			t.Fatalf("%d of %d bytes: %v", n, size, err)
		}
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want.Bytes()) {
		t.Errorf("the file has %d bytes, want %d (%v)", len(got), want.Len(), err)
	}
	f.Close()
	if n, err := p.Write([]byte("more")); n != 0 || err == nil {
		t.Errorf("a closed file takes %d bytes: %v", n, err)
	}
}
