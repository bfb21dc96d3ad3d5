package trace

// MaxQueue is the number of requests whose traces wait.
const MaxQueue = maxQueue

// Encode returns the message with one trace.
func (t *Tracer) Encode(r *Request) (body []byte, spans int) { return t.encode([]*Request{r}) }
