package admin

import (
	"context"

	"countersign/admin/api"
	"countersign/internal/requestid"
)

// hasTLS returns an error without an HTTPS listener.
func (s *server) hasTLS() error {
	if s.Certificates == nil {
		return notFound.errorf("the appliance has no HTTPS listener: see admin_https in the configuration")
	}
	return nil
}

func (s *server) tls(ctx context.Context, _ caller, _ *none) (api.TLS, error) {
	if err := s.hasTLS(); err != nil {
		return api.TLS{}, err
	}
	ca, err := s.Certificates.Authority(ctx)
	if err != nil {
		return api.TLS{}, err
	}
	st := s.Certificates.Status()
	return api.TLS{
		Installed: st.Installed, Names: append([]string{}, st.Names...), Issuer: st.Issuer,
		NotBefore: unix(st.NotBefore), NotAfter: unix(st.NotAfter), Warning: st.Warning, CA: string(ca),
	}, nil
}

func (s *server) csr(ctx context.Context, _ caller, _ *none) (api.PEM, error) {
	if err := s.hasTLS(); err != nil {
		return api.PEM{}, err
	}
	b, err := s.Certificates.CSR(ctx)
	return api.PEM{PEM: string(b)}, err
}

func (s *server) installCertificate(ctx context.Context, who caller, in *body[api.PEM]) (api.TLS, error) {
	if err := s.hasTLS(); err != nil {
		return api.TLS{}, err
	}
	if err := s.Appliance.RecordCertificate(ctx, who.actor(), "tls install", []byte(in.Body.PEM)); err != nil {
		return api.TLS{}, err
	}
	if err := s.Certificates.Install(ctx, []byte(in.Body.PEM)); err != nil {
		return api.TLS{}, err
	}
	is := s.Certificates.Status()
	s.Log.Info("a certificate of HTTPS was installed", "issuer", is.Issuer, "not_after", is.NotAfter,
		"operator", who.actor().Name, requestid.Attr(who.Request))
	return s.tls(ctx, who, nil)
}

func (s *server) uninstallCertificate(ctx context.Context, who caller, _ *none) (api.TLS, error) {
	if err := s.hasTLS(); err != nil {
		return api.TLS{}, err
	}
	if err := s.Appliance.RecordCertificate(ctx, who.actor(), "tls uninstall", nil); err != nil {
		return api.TLS{}, err
	}
	if err := s.Certificates.Uninstall(ctx); err != nil {
		return api.TLS{}, err
	}
	s.Log.Info("the appliance's own certificate of HTTPS is in use again",
		"operator", who.actor().Name, requestid.Attr(who.Request))
	return s.tls(ctx, who, nil)
}
