package main

import (
	"context"
	"log/slog"
	"net"
	"slices"

	"countersign/admin"
	"countersign/admin/certs"
)

// prepared has the listeners and the certificates of a daemon before the event Started. serve and
// check prepare in the same way, so check refuses what serve refuses. Nothing is written.
type prepared struct {
	doors   []*door
	socket  *knocker // of the admin API, also in admin
	missing []string // addresses and the Noise key, as far as the machine does not have them yet
	group   string   // id of the admin socket's group, or ""
	admin   []net.Listener
	metrics []net.Listener // one, or none without metrics_listen
	certs   *certs.Manager // nil without admin_https
}

// prepare opens all that serve needs beside the parts and the given sockets. The caller closes the
// listeners, also after an error.
func prepare(ctx context.Context, c Config, p parts, given sockets, log *slog.Logger) (r prepared, err error) {
	if err := p.app.Ready(); err != nil {
		return r, err
	}
	r.doors = peerDoors(c, given)
	if r.missing, err = lookForMissing(ctx, p.app, r.doors); err != nil {
		return r, err
	}
	if r.group, err = c.adminGroup(); err != nil {
		return r, err
	}
	socket := given[c.AdminSocket]
	if socket != nil {
		if err = admin.CheckSocket(c.AdminSocket, r.group); err != nil {
			err = configError{err}
		}
	} else {
		socket, err = admin.Listen(c.AdminSocket, r.group)
	}
	if err != nil {
		return r, err
	}
	r.socket = newKnocker(socket)
	r.admin = append(r.admin, r.socket)
	if c.MetricsListen != "" {
		metrics, err := admin.ListenMetrics(c.MetricsListen)
		if err != nil {
			return r, err
		}
		r.metrics = append(r.metrics, metrics)
	}
	if r.certs, err = certificates(c, p, log); err != nil || r.certs == nil {
		return r, err
	}
	https, err := admin.ListenTLS(c.AdminHTTPS, c.adminNetworks(), r.certs)
	if err != nil {
		return r, err
	}
	r.admin = append(r.admin, https)
	return r, nil
}

// close closes the listeners.
func (r prepared) close() {
	for _, d := range r.doors {
		d.Close()
	}
	for _, l := range slices.Concat(r.admin, r.metrics) {
		l.Close()
	}
}
