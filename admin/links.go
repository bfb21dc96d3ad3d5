package admin

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"slices"
	"sync"
	"time"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/internal/ijson"
	"countersign/internal/manage"
	"countersign/internal/operators"
	"countersign/internal/secret"
)

// Limits of links.
const (
	linkLife      = 24 * time.Hour
	firstLinkLife = 30 * time.Minute
	maxLinks      = 64
)

// links are the links by which persons make passkeys. A link gives no right: its passkey becomes a
// credential by an approved proposal, except the link of the first administrator, which only root
// can make. The invariants:
//
//   - Memory has only SHA-256 of a link's secret, and no link outlives the daemon.
//   - A link makes at most one passkey. While a caller uses a link, no other caller can.
type links struct {
	mu  sync.Mutex
	all []*link
}

type link struct {
	api.Link
	digest [sha256.Size]byte // of the secret
	by     operators.Channel // of the caller who has made the link
	busy   bool              // a caller uses the link
}

// make makes a link and returns its secret.
func (l *links) make(doc api.Link, by operators.Channel, life time.Duration) (api.Link, secret.Bytes, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	l.dropExpired(now)
	if len(l.all) >= maxLinks {
		return api.Link{}, secret.Bytes{}, conflict.errorf(
			"there are %d links, as many as there may be: remove one", maxLinks)
	}
	if doc.First { // the newest one counts
		l.all = slices.DeleteFunc(l.all, func(x *link) bool { return x.First })
	}
	made := secret.Of(rand.Text() + rand.Text())
	doc.ID, doc.Expires = rand.Text()[:16], now.Add(life).Unix()
	l.all = append(l.all, &link{Link: doc, digest: sha256.Sum256(made.Expose()), by: by})
	return doc, made, nil
}

// dropExpired removes links whose time is over. A used link stays for the proposal until then.
func (l *links) dropExpired(now time.Time) {
	l.all = slices.DeleteFunc(l.all, func(x *link) bool { return now.Unix() >= x.Expires && !x.busy })
}

// open returns the unused link of a secret.
func (l *links) open(by secret.Bytes) (api.Link, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	x, err := l.find(by)
	if err != nil {
		return api.Link{}, err
	}
	return x.Link, nil
}

func (l *links) find(by secret.Bytes) (*link, error) {
	l.dropExpired(time.Now())
	digest := sha256.Sum256(by.Expose())
	at := slices.IndexFunc(l.all, func(x *link) bool { return x.digest == digest })
	if at < 0 || l.all[at].Used != 0 {
		return nil, notProven.errorf(
			"the link is unknown, used or too old, or the daemon has restarted: ask for a new one")
	}
	return l.all[at], nil
}

// use passes an unused link to a function, which makes the passkey of the link. The link is used if
// the function succeeds.
func (l *links) use(
	by secret.Bytes, do func(api.Link, operators.Channel) (approval.Credential, error),
) (api.Link, error) {
	l.mu.Lock()
	x, err := l.find(by)
	if err == nil && x.busy {
		err = conflict.errorf("somebody else uses the link at this moment")
	}
	if err != nil {
		l.mu.Unlock()
		return api.Link{}, err
	}
	x.busy = true
	l.mu.Unlock()
	made, err := do(x.Link, x.by)
	l.mu.Lock()
	defer l.mu.Unlock()
	if x.busy = false; err != nil {
		return api.Link{}, err
	}
	x.Used, x.Credential = time.Now().Unix(), &made
	return x.Link, nil
}

func (l *links) list() []api.Link {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dropExpired(time.Now())
	all := docs(l.all, func(x *link) api.Link { return x.Link })
	slices.SortFunc(all, func(x, y api.Link) int { return cmp.Compare(y.Expires, x.Expires) })
	return all
}

func (l *links) remove(id string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	before := len(l.all)
	l.all = slices.DeleteFunc(l.all, func(x *link) bool { return x.ID == id && !x.busy })
	if len(l.all) == before {
		return fmt.Errorf("link %q: %w", ijson.Clip(id), manage.ErrNotFound)
	}
	return nil
}

// linkURL returns the address of a link. The secret is in the fragment, which browsers keep for
// themselves.
func (s *server) linkURL(of secret.Bytes) string { return s.Origin + "/enrol#" + string(of.Expose()) }

func (s *server) hasConsole() error {
	if s.Certificates == nil {
		return conflict.errorf("a passkey needs HTTPS: see admin_https in the configuration")
	}
	return nil
}

func (s *server) firstLink(_ context.Context, who caller, in *body[api.NewLink]) (api.MadeLink, error) {
	name := in.Body.Operator
	err := s.hasConsole()
	switch {
	case err != nil:
	case who.Kind != operators.Unix || who.UID != 0:
		err = notAllowed.errorf("root enrols the first administrator, on the Unix socket")
	case s.Operators.Initialised():
		err = conflict.errorf("there are operators already: one of them makes a link for %q", ijson.Clip(name))
	default:
		_, err = s.Operators.PasskeyOptions(nil, name, nil) // checks the name
	}
	if err != nil {
		return api.MadeLink{}, err
	}
	doc, made, err := s.links.make(api.Link{
		Operator: name, Roles: operators.FirstRoles(), By: who.name(), First: true,
	}, who.Channel, firstLinkLife)
	return api.MadeLink{Link: doc, URL: s.linkURL(made)}, err
}

func (s *server) newLink(_ context.Context, who caller, in *body[api.NewLink]) (api.MadeLink, error) {
	n := in.Body
	if err := s.hasConsole(); err != nil {
		return api.MadeLink{}, err
	}
	_, err := s.Operators.PasskeyOptions(nil, n.Operator, nil)
	if err != nil {
		return api.MadeLink{}, err
	}
	_, err = s.Operators.Operator(n.Operator)
	enrolled := err == nil
	switch {
	case enrolled && len(n.Roles) > 0:
		return api.MadeLink{}, invalid.errorf("operator %s has roles already: omit them", n.Operator)
	case !enrolled && len(n.Roles) == 0:
		return api.MadeLink{}, invalid.errorf("operator %s is new: name the roles", n.Operator)
	}
	for _, role := range n.Roles {
		if !role.Known() {
			return api.MadeLink{}, invalid.errorf("there is no role %q", ijson.Clip(string(role)))
		}
	}
	doc, made, err := s.links.make(api.Link{
		Operator: n.Operator, Roles: append([]approval.Role{}, n.Roles...), By: who.session.Operator,
	}, who.Channel, linkLife)
	return api.MadeLink{Link: doc, URL: s.linkURL(made)}, err
}

func (s *server) listLinks(context.Context, caller, *none) ([]api.Link, error) {
	return s.links.list(), nil
}

func (s *server) removeLink(_ context.Context, _ caller, in *struct {
	ID string `path:"id" maxLength:"64"`
}) error {
	return s.links.remove(in.ID)
}

func (s *server) openLink(_ context.Context, _ caller, in *body[api.OpenLink]) (doc api.OpenedLink, err error) {
	if doc.Link, err = s.links.open(secret.Of(in.Body.Secret)); err != nil {
		return doc, err
	}
	var challenge []byte
	doc.Challenge, challenge = s.newRegistration(time.Now().Add(registrationTimeout))
	doc.Appliance = s.Operators.Appliance
	doc.PublicKey, err = s.Operators.PasskeyOptions(challenge, doc.Operator, nil)
	return doc, err
}

func (s *server) useLink(ctx context.Context, who caller, in *body[api.UseLink]) (api.Link, error) {
	challenge, ok := s.parseRegistration(in.Body.Challenge)
	if !ok {
		return api.Link{}, notProven.errorf("the challenge is unknown or too old: open the link again")
	}
	return s.links.use(secret.Of(in.Body.Secret), func(l api.Link, by operators.Channel) (approval.Credential, error) {
		c, err := approval.NewPasskey(challenge, s.RPID, s.Origin, in.Body.Credential)
		if err != nil || !l.First {
			return c, err
		}
		by.Request = who.Request
		o, err := s.Operators.EnrolFirst(ctx, by, l.Operator, c)
		if err != nil {
			return c, err
		}
		return o.Credentials[0], nil
	})
}
