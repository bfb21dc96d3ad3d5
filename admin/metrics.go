package admin

import (
	"context"
	"log"
	"net"
	"net/http"
	"time"

	"countersign/internal/meter"
)

// maxScrapers is the maximum number of connections to the listener of metrics. Further connections
// wait.
const maxScrapers = 16

// ListenMetrics listens on a loopback address for NewMetrics.
func ListenMetrics(address string) (net.Listener, error) {
	return listenFrom("metrics_listen", address, nil, maxScrapers)
}

// NewMetrics returns the server of metrics for programs that can't sign in.
func NewMetrics(m *meter.Meter, errorLog *log.Logger) *http.Server {
	return &http.Server{
		Handler:           http.MaxBytesHandler(m.Handler(), 0),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       5 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          errorLog,
	}
}

type metricsInput struct {
	Accept string `header:"Accept" maxLength:"1000" doc:"formats as Prometheus names them: text, OpenMetrics"`
}

type exposition struct {
	ContentType string `header:"Content-Type"`
	Body        []byte
}

// metrics serves operators, and scrapers without a session, who share one collection a second.
func (s *server) metrics(_ context.Context, who caller, in *metricsInput) (*exposition, error) {
	expose := s.Meter.Expose
	if who.session == nil {
		expose = s.Meter.ExposeShared
	}
	contentType, body, err := expose(in.Accept)
	if err != nil {
		return nil, err
	}
	return &exposition{contentType, body}, nil
}
