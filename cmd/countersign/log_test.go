package main

import (
	"errors"
	"testing"

	"countersign/admin/api"
	"countersign/audit"
)

func TestFirstSince(t *testing.T) {
	for first := range uint64(3) { // events before first were dropped
		for size := range uint64(20) {
			at := func(index uint64) ([]api.Event, error) {
				if index = max(index, first); index >= size {
					return nil, nil
				}
				e := audit.Event{TimeMS: int64(index) / 2 * 10} // two events have one time
				return []api.Event{{Index: index, Event: e}}, nil
			}
			for ms := int64(-5); ms < 110; ms += 5 {
				got, err := firstSince(ms, at)
				if err != nil {
					t.Fatal(err)
				}
				for i := first; i < size; i++ {
					if late := int64(i)/2*10 >= ms; late != (i >= got) {
						t.Errorf("%d events from %d on, since %d: from %d on", size, first, ms, got)
					}
				}
			}
		}
	}
	gone := errors.New("gone")
	if _, err := firstSince(1, func(uint64) ([]api.Event, error) { return nil, gone }); !errors.Is(err, gone) {
		t.Errorf("after a failure: %v", err)
	}
}
