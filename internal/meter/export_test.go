package meter

import "github.com/prometheus/client_golang/prometheus"

// Try counts an act of any series that has acts, with size 1.
func (m *Meter) Try(s *Series, labels ...string) {
	if _, ok := m.counters[s]; ok {
		m.Add(s, labels...)
	}
	if _, ok := m.histograms[s]; ok {
		m.Observe(s, 1, labels...)
	}
}

// OnlyStates returns a meter with the sources of m alone, which may set any series.
func (m *Meter) OnlyStates() *Meter {
	only := &Meter{registry: prometheus.NewRegistry(), sources: m.sources}
	only.registry.MustRegister(collector{only})
	return only
}

// States returns the series that are read from states.
func (m *Meter) States() (all []*Series) {
	for _, s := range All {
		if _, counted := m.counters[s]; !counted && s.Kind != Histogram {
			all = append(all, s)
		}
	}
	return all
}
