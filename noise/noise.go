// Package noise implements Noise_IK_25519_ChaChaPoly_BLAKE2s over a net.Conn. The static private
// key may be in memory or on a device. Begin reading at Accept; pubky.go has the identity payload
// of pubky-noise clients.
//
// Each message, also of the handshake, is a frame: a big-endian u32 length n and n bytes, with n at
// most 65,535. The length of a frame is checked before the allocation of memory. The Noise
// specification is revision 34 (https://noiseprotocol.org/noise.html).
package noise

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"countersign/internal/pubkey"

	"github.com/flynn/noise"
)

// Lengths in bytes.
const (
	MaxMessage   = 65535                // limit of a frame, and so of a Noise message
	MaxPlaintext = MaxMessage - tagSize // limit of the plaintext of a transport message

	headerSize  = 4
	firstPart   = 4096 // of a frame that is read into a new buffer
	tagSize     = 16
	minMessage1 = 32 + 32 + tagSize + tagSize // e, s (encrypted), payload (empty)
	minMessage2 = 32 + tagSize                // e, payload (empty)
)

// Profile determines the payloads of a handshake. A profile's text is the prologue of the
// handshake, so a handshake between two profiles fails.
type Profile string

const (
	CountersignV1 Profile = "countersign-v1" // empty payloads
	PubkyV1       Profile = "pubky-noise-v1" // message 1 carries an identity payload, see PubkyIdentity
)

// Known reports whether p is CountersignV1 or PubkyV1.
func (p Profile) Known() bool { return p == CountersignV1 || p == PubkyV1 }

// maxPayload returns the limit of the payload of message 1, in bytes.
func (p Profile) maxPayload() int {
	if p == PubkyV1 {
		return maxIdentity
	}
	return 0
}

// Errors of a handshake or a connection. Errors of the network are returned as they are.
var (
	ErrHandshake   = errors.New("noise: handshake refused")
	ErrIdentity    = fmt.Errorf("%w: identity payload", ErrHandshake)
	ErrNotEnrolled = errors.New("noise: peer is not enrolled")
	ErrFrame       = errors.New("noise: frame of impossible length")
	ErrDecrypt     = errors.New("noise: message does not decrypt")
	ErrTooLarge    = errors.New("noise: message does not fit into a frame")
	// ErrServerKey refuses a message 1 that decrypts with none of the responder's static keys.
	ErrServerKey = errors.New("it is for another static key of the server, or is no handshake")
)

// ProfileError refuses a message 1 of another profile. Accept wraps it together with ErrFrame if
// only the other profile has messages of the length, and otherwise together with ErrHandshake.
type ProfileError struct {
	Profile Profile  // of the responder
	Claimed [32]byte // the initiator's static public key, without a proof; zero if the length told
}

func (e *ProfileError) Error() string {
	return "it is of another profile than " + string(e.Profile)
}

// Static is a static X25519 key pair. The private key may be on a device.
type Static interface {
	// Public returns the public key.
	Public() [32]byte
	// Exchange returns X25519(private key, peer). Exchange fails for a point of low order and for
	// an unavailable device.
	Exchange(ctx context.Context, peer [32]byte) ([32]byte, error)
}

// Conn is a connection after the handshake. One goroutine may read while others write.
type Conn struct {
	conn         net.Conn
	r            *bufio.Reader
	own          [32]byte      // the static public key of this end
	peer         [32]byte      // the static public key of the other end
	writeTimeout time.Duration // for one write; 0: none
	// identity is the Ed25519 key proven by the identity payload, at the responder of PubkyV1, and
	// nil elsewhere.
	identity *[32]byte

	in      *noise.CipherState // for the reader only
	frame   []byte             // for the reader only: the frame of the present message
	writeMu sync.Mutex
	out     *noise.CipherState // guarded by writeMu
	buf     []byte             // guarded by writeMu
}

// Accept runs the responder's side of the handshake.
//
// statics has the responder's static keys: two during a key rotation, the old and the new one.
// Message 1 is tried with each key in their order until message 1 decrypts. A message for none of
// the keys costs one exchange with each key, so keep the list short. The error of a device ends the
// handshake and is returned as such, rather than as a refusal of the handshake.
//
// admit is called with a message 1 of a valid length and before the first use of a static key: the
// place for a rate limiter. An error of admit ends the handshake and is wrapped. A nil admit admits
// every handshake.
//
// enrolled decides about the peer's static public key, after message 1 and before message 2. So a
// peer without enrolment gets no response at all. ctx bounds the whole handshake. On any error the
// caller must close conn without a response: the peer can't tell the errors apart.
func Accept(ctx context.Context, conn net.Conn, statics []Static, profile Profile,
	admit func(context.Context) error, enrolled func(peer [32]byte) bool) (*Conn, error) {
	c := newConn(conn)
	if err := c.accept(ctx, statics, profile, admit, enrolled, nil); err != nil {
		return nil, err
	}
	return c, nil
}

// accept is Accept on c. random is the source of the ephemeral key in tests, and nil otherwise.
func (c *Conn) accept(ctx context.Context, statics []Static, profile Profile,
	admit func(context.Context) error, enrolled func(peer [32]byte) bool, random io.Reader) error {
	if !profile.Known() {
		return fmt.Errorf("noise: unknown profile %q: use %s or %s", string(profile), CountersignV1, PubkyV1)
	}
	if len(statics) == 0 {
		return errors.New("noise: Accept needs at least one static key")
	}
	defer c.applyContext(ctx)()
	// -> e, es, s, ss
	if n, err := c.header(minMessage1, minMessage1+maxIdentity); err == nil && n > minMessage1+profile.maxPayload() {
		return fmt.Errorf("%w: message 1 has %d bytes: %w", ErrFrame, n, &ProfileError{Profile: profile})
	}
	message1, err := c.readFrame(minMessage1, minMessage1+profile.maxPayload())
	if err != nil {
		return err
	}
	if admit != nil {
		if err := admit(ctx); err != nil {
			return fmt.Errorf("noise: handshake not admitted: %w", err)
		}
	}
	hs, payload, own, err := readMessage1(ctx, statics, profile, message1, random)
	if err != nil {
		return fmt.Errorf("%w: message 1: %w", ErrHandshake, err)
	}
	c.own = own
	copy(c.peer[:], hs.PeerStatic())
	// The identity is checked also for a peer without enrolment, so the time of a refusal does not
	// tell which keys are enrolled.
	var identityErr error
	if profile == PubkyV1 {
		c.identity, identityErr = checkIdentity(payload, c.peer, c.own, time.Now())
	}
	// A key with two encodings would have two enrolments: only one encoding is let in.
	if !enrolled(c.peer) || pubkey.CheckX25519(c.peer[:]) != nil {
		return ErrNotEnrolled
	}
	if identityErr != nil {
		return identityErr
	}
	// <- e, ee, se
	message2, in, out, err := hs.WriteMessage(nil, nil)
	if err != nil {
		return fmt.Errorf("%w: message 2: %w", ErrHandshake, err)
	}
	if err := c.writeFrame(message2); err != nil {
		return err
	}
	c.in, c.out = in, out
	return nil
}

// readMessage1 reads message 1 with the initiator's choice of the static keys. The results are the
// handshake, the payload and the public key. With a wrong key the token s does not decrypt, and es
// is the only exchange with the key. After a decryption of s the key is the right one and no
// further key is tried, even after a later error. So a message costs at most one exchange for each
// key, and one more for ss.
func readMessage1(ctx context.Context, statics []Static, profile Profile, message1 []byte, random io.Reader) (
	hs *noise.HandshakeState, payload []byte, own [32]byte, err error) {
	var tried []*trackedStatic
	for _, static := range statics {
		if err := ctx.Err(); err != nil {
			return nil, nil, own, err
		}
		t := &trackedStatic{Static: static}
		tried = append(tried, t)
		if hs, err = newHandshake(ctx, t, profile, nil, random); err != nil {
			return nil, nil, own, err
		}
		payload, _, _, err = hs.ReadMessage(nil, message1)
		if err == nil {
			return hs, payload, static.Public(), nil
		}
		if t.failed || t.exchanges > 1 {
			return nil, nil, own, err
		}
	}
	for _, t := range tried {
		if err := t.otherProfile(ctx, profile, message1); err != nil {
			return nil, nil, own, err
		}
	}
	return nil, nil, own, ErrServerKey
}

// otherProfile returns a *ProfileError if message 1 is for the static key in another profile, so
// that an operator can tell a wrong profile from a wrong key. The device is not used again: es is
// the same in each profile, and the end of the attempt is ss.
func (t *trackedStatic) otherProfile(ctx context.Context, profile Profile, message1 []byte) error {
	for _, other := range []Profile{CountersignV1, PubkyV1} {
		if other == profile {
			continue
		}
		known := &onceMore{trackedStatic: t}
		hs, err := newHandshake(ctx, known, other, nil, nil)
		if err != nil {
			return err
		}
		if _, _, _, err := hs.ReadMessage(nil, message1); err != nil && known.exchanges > 1 {
			wrong := &ProfileError{Profile: profile}
			copy(wrong.Claimed[:], hs.PeerStatic())
			return wrong
		}
	}
	return nil
}

// onceMore is a static key that repeats the result of its first exchange, and has no other one.
type onceMore struct {
	*trackedStatic
	exchanges int
}

var errNoExchange = errors.New("noise: no further exchange")

func (o *onceMore) Exchange(context.Context, [32]byte) ([32]byte, error) {
	if o.exchanges++; o.exchanges > 1 {
		return [32]byte{}, errNoExchange
	}
	return o.first, nil
}

// trackedStatic records the uses of a static key in one handshake.
type trackedStatic struct {
	Static
	exchanges int
	first     [32]byte // the result of the first exchange
	failed    bool     // an exchange failed: an error of the device, or a point of low order
}

func (t *trackedStatic) Exchange(ctx context.Context, peer [32]byte) (shared [32]byte, err error) {
	t.exchanges++
	shared, err = t.Static.Exchange(ctx, peer)
	if t.exchanges == 1 {
		t.first = shared
	}
	t.failed = t.failed || err != nil
	return shared, err
}

// Connect runs the initiator's side of the handshake with the responder of the static public key
// server. payload is the result of PubkyIdentity for static and server, or nil in CountersignV1.
// ctx bounds the whole handshake.
//
// A connection closed without a response gives ErrHandshake: the responder has not enrolled the
// peer, refuses the peer's identity, does not have the private key of server, or uses another
// profile.
func Connect(ctx context.Context, conn net.Conn, static Static, profile Profile, server [32]byte, payload []byte) (
	*Conn, error) {
	c := newConn(conn)
	if err := c.connect(ctx, static, profile, server, payload, nil); err != nil {
		return nil, err
	}
	return c, nil
}

// connect is Connect on c. random is the source of the ephemeral key in tests, and nil otherwise.
func (c *Conn) connect(ctx context.Context, static Static, profile Profile, server [32]byte, payload []byte,
	random io.Reader) error {
	if !profile.Known() {
		return fmt.Errorf("noise: unknown profile %q: use %s or %s", string(profile), CountersignV1, PubkyV1)
	}
	if len(payload) > profile.maxPayload() || len(payload) == 0 && profile == PubkyV1 {
		return fmt.Errorf("noise: a payload of %d bytes is not valid in profile %s", len(payload), profile)
	}
	c.own, c.peer = static.Public(), server
	defer c.applyContext(ctx)()
	hs, err := newHandshake(ctx, static, profile, server[:], random)
	if err != nil {
		return err
	}
	// -> e, es, s, ss
	message1, _, _, err := hs.WriteMessage(nil, payload)
	if err != nil {
		return fmt.Errorf("%w: message 1: %w", ErrHandshake, err)
	}
	if err := c.writeFrame(message1); err != nil {
		return err
	}
	// <- e, ee, se
	message2, err := c.readFrame(minMessage2, minMessage2)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || isReset(err) {
		return fmt.Errorf("%w: check the server's key, which may have been rotated, the profile %s, and that "+
			"the peer is enrolled with the key %x", ErrHandshake, string(profile), c.own)
	} else if err != nil {
		return err
	}
	_, out, in, err := hs.ReadMessage(nil, message2)
	if err != nil {
		return fmt.Errorf("%w: message 2: %w", ErrHandshake, err)
	}
	c.in, c.out = in, out
	return nil
}

// Peer returns the static public key of the other end.
func (c *Conn) Peer() [32]byte { return c.peer }

// Static returns the static public key of this end: of several keys, the one in the handshake.
func (c *Conn) Static() [32]byte { return c.own }

// Identity returns the Ed25519 public key proven to Accept by a peer of PubkyV1. Before the first
// transport message of the peer, an attacker may have replayed a recorded message 1, and neither
// Identity nor Peer is proven yet.
func (c *Conn) Identity() (ed25519 [32]byte, ok bool) {
	if c.identity == nil {
		return ed25519, false
	}
	return *c.identity, true
}

// Await waits for the first byte of the next message, or for the end of the connection (io.EOF).
// With Await a caller can set different deadlines for the wait and for the reading of a message.
func (c *Conn) Await() error {
	_, err := c.r.Peek(1)
	return err
}

// Next waits for the header of the next message, and returns the message's length in bytes. The
// message itself stays unread: a caller can wait before ReadMessage, and TCP slows the peer down.
func (c *Conn) Next() (length int, err error) {
	n, err := c.header(tagSize, MaxMessage)
	return n - tagSize, err
}

// header waits for the header of the next frame, and returns the length of the frame. The header
// stays unread.
func (c *Conn) header(minLen, maxLen int) (int, error) {
	header, err := c.r.Peek(headerSize)
	if err == io.EOF && len(header) > 0 {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return 0, err
	}
	return frameLength(header, minLen, maxLen)
}

// ReadMessage returns the next message. The error io.EOF means a clean end of the connection
// between two messages.
func (c *Conn) ReadMessage() ([]byte, error) {
	frame, err := c.readFrame(tagSize, MaxMessage)
	if err != nil {
		return nil, err
	}
	plain, err := c.in.Decrypt(nil, nil, frame)
	if err != nil {
		return nil, ErrDecrypt
	}
	return plain, nil
}

// WriteMessage sends one message of at most MaxPlaintext bytes. After any error except ErrTooLarge
// the connection is broken.
func (c *Conn) WriteMessage(p []byte) error {
	if len(p) > MaxPlaintext {
		return ErrTooLarge
	}
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	frame := binary.BigEndian.AppendUint32(c.buf[:0], uint32(len(p)+tagSize))
	frame, err := c.out.Encrypt(frame, nil, p)
	if err != nil {
		return fmt.Errorf("noise: encrypt: %w", err)
	}
	c.buf = frame
	if c.writeTimeout > 0 {
		c.conn.SetWriteDeadline(time.Now().Add(c.writeTimeout))
	}
	_, err = c.conn.Write(frame)
	return err
}

// SetReadDeadline sets the deadline of all later reads.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.conn.SetReadDeadline(t) }

// SetWriteLimit sets the timeout of each later write. The limit must be set before concurrent
// writes.
func (c *Conn) SetWriteLimit(limit time.Duration) { c.writeTimeout = limit }

// RemoteAddr returns the network address of the other end.
func (c *Conn) RemoteAddr() net.Addr { return c.conn.RemoteAddr() }

// Close closes the connection.
func (c *Conn) Close() error { return c.conn.Close() }

func newConn(conn net.Conn) *Conn { return &Conn{conn: conn, r: bufio.NewReader(conn)} }

// applyContext applies ctx's deadline and cancellation to the connection, until the call of lift.
func (c *Conn) applyContext(ctx context.Context) (lift func()) {
	if t, ok := ctx.Deadline(); ok {
		c.conn.SetDeadline(t)
	}
	stop := context.AfterFunc(ctx, func() { c.conn.SetDeadline(time.Unix(1, 0)) })
	return func() {
		if stop() {
			c.conn.SetDeadline(time.Time{})
		}
	}
}

// frameLength returns the length in the header of a frame. A length outside of the limits is
// ErrFrame.
func frameLength(header []byte, minLen, maxLen int) (int, error) {
	n := binary.BigEndian.Uint32(header)
	if n < uint32(minLen) || n > uint32(maxLen) {
		return 0, fmt.Errorf("%w: %d bytes, expected %d to %d", ErrFrame, n, minLen, maxLen)
	}
	return int(n), nil
}

// readFrame returns a frame of minLen to maxLen bytes, valid until the next call. The length is
// checked before the allocation of memory, and the buffer grows with the bytes that have arrived: a
// header alone costs 4 KiB, whatever length it announces.
func (c *Conn) readFrame(minLen, maxLen int) ([]byte, error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(c.r, header[:]); err != nil {
		return nil, err
	}
	n, err := frameLength(header[:], minLen, maxLen)
	if err != nil {
		return nil, err
	}
	for c.frame = c.frame[:0]; len(c.frame) < n; {
		if len(c.frame) == cap(c.frame) {
			c.frame = slices.Grow(c.frame, min(n-len(c.frame), max(len(c.frame), firstPart)))
		}
		began := len(c.frame)
		c.frame = c.frame[:min(n, cap(c.frame))]
		if _, err := io.ReadFull(c.r, c.frame[began:]); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	return c.frame, nil
}

// writeFrame sends a message of the handshake.
func (c *Conn) writeFrame(message []byte) error {
	_, err := c.conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(message))), message...))
	return err
}

// isReset reports an error of the network other than a timeout.
func isReset(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && !op.Timeout()
}

// newHandshake prepares a handshake: the initiator's with a server, the responder's without. random
// is nil except for test vectors.
func newHandshake(ctx context.Context, static Static, profile Profile, server []byte, random io.Reader) (
	*noise.HandshakeState, error) {
	public := static.Public()
	return noise.NewHandshakeState(noise.Config{
		Random:        random,
		CipherSuite:   noise.NewCipherSuite(dh{ctx, static}, noise.CipherChaChaPoly, noise.HashBLAKE2s),
		Pattern:       noise.HandshakeIK,
		Initiator:     server != nil,
		Prologue:      []byte(profile),
		StaticKeypair: noise.DHKey{Private: []byte(staticHandle), Public: public[:]},
		PeerStatic:    server,
	})
}

// staticHandle takes the place of the static private key in flynn/noise, which passes the value
// unchanged to dh.DH. A handle has 6 bytes and an ephemeral private key 32, so dh.DH can tell them
// apart.
const staticHandle = "static"

// dh is X25519 with the static private key in a Static, for one handshake with its context.
type dh struct {
	ctx    context.Context
	static Static
}

func (d dh) GenerateKeypair(random io.Reader) (noise.DHKey, error) {
	return noise.DH25519.GenerateKeypair(random)
}

func (d dh) DH(private, public []byte) ([]byte, error) {
	if string(private) != staticHandle {
		return noise.DH25519.DH(private, public)
	}
	shared, err := d.static.Exchange(d.ctx, [32]byte(public))
	return shared[:], err
}

func (d dh) DHLen() int     { return 32 }
func (d dh) DHName() string { return noise.DH25519.DHName() }
