// Package noise is Noise_IK_25519_ChaChaPoly_BLAKE2s over a net.Conn, with the static private key anywhere: in memory, or
// behind a handle to a device. Begin reading at Accept; what is particular to clients of pubky-noise is in pubky.go.
//
// Every message, handshake included, is a frame: a big-endian u32 length and that many bytes, at most 65,535. A frame
// that is longer is refused before anything is allocated for it. The Noise specification is revision 34
// (https://noiseprotocol.org/noise.html).
package noise

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/flynn/noise"
)

// MaxMessage is the longest frame, and so the longest Noise message, in bytes. MaxPlaintext is what fits into it.
const (
	MaxMessage   = 65535
	MaxPlaintext = MaxMessage - tagSize

	tagSize     = 16
	minMessage1 = 32 + 32 + tagSize + tagSize // e, s (encrypted), payload (empty)
	minMessage2 = 32 + tagSize                // e, payload (empty)
)

// Profile says what a handshake carries; both ends must mean the same one. Its text is the prologue.
type Profile string

const (
	CountersignV1 Profile = "countersign-v1" // empty payloads
	PubkyV1       Profile = "pubky-noise-v1" // message 1 carries an identity payload, see PubkyIdentity
)

// Known reports whether p is one of the profiles above.
func (p Profile) Known() bool { return p == CountersignV1 || p == PubkyV1 }

// maxPayload is the size of the largest payload of message 1.
func (p Profile) maxPayload() int {
	if p == PubkyV1 {
		return maxIdentity
	}
	return 0
}

// How a handshake or a connection fails. A broken network is none of these and is wrapped as it is.
var (
	ErrHandshake = errors.New("noise: handshake refused")
	ErrIdentity  = fmt.Errorf("%w: identity payload", ErrHandshake)
	ErrStranger  = errors.New("noise: peer is not enrolled")
	ErrFrame     = errors.New("noise: frame of impossible length")
	ErrDecrypt   = errors.New("noise: message does not decrypt")
	ErrTooLarge  = errors.New("noise: message does not fit into a frame")
)

// Static is a static X25519 key pair whose private half may live elsewhere.
type Static interface {
	// Public returns the public key.
	Public() [32]byte
	// Exchange returns X25519(private key, peer). It fails for a point of low order, and when the key can't be reached.
	Exchange(ctx context.Context, peer [32]byte) ([32]byte, error)
}

// Conn is an established connection. One goroutine may read while others write.
type Conn struct {
	conn  net.Conn
	r     *bufio.Reader
	own   [32]byte // which of our keys it is with
	peer  [32]byte
	limit time.Duration // for one write
	// identity is what the identity payload has proven, on the responder's side of PubkyV1; nil elsewhere.
	identity *[32]byte

	in      *noise.CipherState // reader only
	frame   []byte             // reader only: the ciphertext of the message that is being read
	writing sync.Mutex
	out     *noise.CipherState // under writing
	buf     []byte             // under writing
}

// Accept runs the responder's side of the handshake with one of several static keys: while a key is being replaced, the old and the
// new one answer. A message 1 is tried with each in their order, until it decrypts. One that decrypts with none costs one exchange for
// each key, so give few; the error of a device ends the handshake, so that it is not taken for a refusal. admit is asked when a message 1 of a possible length is there, before
// anything is computed with a static key: a limiter's place. Its error ends the handshake and is wrapped; a nil admit
// admits. enrolled decides about the peer's static public key; it is asked after message 1 has been read and before message
// 2 is written, so that a stranger gets no answer at all. ctx bounds the whole handshake. On any error the caller closes
// conn, without a word, and the peer can't tell which error it was.
func Accept(ctx context.Context, conn net.Conn, statics []Static, profile Profile, admit func(context.Context) error, enrolled func(peer [32]byte) bool) (*Conn, error) {
	c := newConn(conn)
	if err := c.accept(ctx, statics, profile, admit, enrolled, nil); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Conn) accept(ctx context.Context, statics []Static, profile Profile, admit func(context.Context) error, enrolled func(peer [32]byte) bool, random io.Reader) error {
	if !profile.Known() {
		return fmt.Errorf("noise: there is no profile %q", string(profile))
	}
	if len(statics) == 0 {
		return errors.New("noise: there is no static key to answer with")
	}
	defer c.deadlineOf(ctx)()
	// -> e, es, s, ss
	message1, err := c.readFrame(minMessage1, minMessage1+profile.maxPayload())
	if err != nil {
		return err
	}
	if admit != nil {
		if err := admit(ctx); err != nil {
			return fmt.Errorf("noise: handshake not admitted: %w", err)
		}
	}
	hs, payload, own, err := open(ctx, statics, profile, message1, random)
	if err != nil {
		return fmt.Errorf("%w: message 1: %w", ErrHandshake, err)
	}
	c.own = own
	copy(c.peer[:], hs.PeerStatic())
	// The identity is judged for strangers too: the time that a refusal takes does not depend on who is enrolled.
	var unproven error
	if profile == PubkyV1 {
		c.identity, unproven = checkIdentity(payload, c.peer, c.own, time.Now())
	}
	if !enrolled(c.peer) {
		return ErrStranger
	}
	if unproven != nil {
		return unproven
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

// open reads message 1 with the key that it was made for, and returns the handshake, the payload, and that key. With a wrong key s
// does not decrypt, so that es is the only exchange with it. Once s decrypts the key is the right one, and the others are not
// tried, whatever comes after s: no message costs more than an exchange for each key and one for ss.
func open(ctx context.Context, statics []Static, profile Profile, message1 []byte, random io.Reader) (hs *noise.HandshakeState, payload []byte, own [32]byte, err error) {
	for _, static := range statics {
		if err := ctx.Err(); err != nil {
			return nil, nil, own, err
		}
		t := &tried{Static: static}
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
	return nil, nil, own, err
}

// tried is a static key whose use in one handshake is watched.
type tried struct {
	Static
	exchanges int
	failed    bool // an exchange gave no result: the device's failure, or a point of low order
}

func (t *tried) Exchange(ctx context.Context, peer [32]byte) (shared [32]byte, err error) {
	t.exchanges++
	shared, err = t.Static.Exchange(ctx, peer)
	t.failed = t.failed || err != nil
	return shared, err
}

// Connect runs the initiator's side of the handshake with a responder whose static public key is known. payload is what
// PubkyIdentity made for this static and server, or nil in CountersignV1. ctx bounds the whole handshake. A responder that
// closes without an answer gives ErrHandshake: it does not know this peer, or does not take its identity, or it does not
// hold the private key of server, or another profile is in use.
func Connect(ctx context.Context, conn net.Conn, static Static, profile Profile, server [32]byte, payload []byte) (*Conn, error) {
	c := newConn(conn)
	if err := c.connect(ctx, static, profile, server, payload, nil); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Conn) connect(ctx context.Context, static Static, profile Profile, server [32]byte, payload []byte, random io.Reader) error {
	if !profile.Known() {
		return fmt.Errorf("noise: there is no profile %q", string(profile))
	}
	if len(payload) > profile.maxPayload() || len(payload) == 0 && profile == PubkyV1 {
		return fmt.Errorf("noise: a payload of %d bytes does not fit into profile %s", len(payload), profile)
	}
	c.own, c.peer = static.Public(), server
	defer c.deadlineOf(ctx)()
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
		return fmt.Errorf("%w: it was closed without an answer: the server does not know this identity, or its key is another, or it can't serve now", ErrHandshake)
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

// Static returns the static public key of this end: of several, the one that the peer has shaken hands with.
func (c *Conn) Static() [32]byte { return c.own }

// Identity returns the Ed25519 public key that a peer of PubkyV1 has proven to Accept. Like Peer it can come from a
// recorded message 1 until a first message has been read.
func (c *Conn) Identity() (ed25519 [32]byte, ok bool) {
	if c.identity == nil {
		return ed25519, false
	}
	return *c.identity, true
}

// Await returns when the first byte of the next message is there, or the connection has ended (io.EOF). So that waiting and
// reading can have deadlines of their own.
func (c *Conn) Await() error {
	_, err := c.r.Peek(1)
	return err
}

// ReadMessage returns the next message. io.EOF is a clean end between two messages.
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

// WriteMessage sends one message of at most MaxPlaintext bytes. After any error but ErrTooLarge the connection is broken.
func (c *Conn) WriteMessage(p []byte) error {
	if len(p) > MaxPlaintext {
		return ErrTooLarge
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	frame := binary.BigEndian.AppendUint32(c.buf[:0], uint32(len(p)+tagSize))
	frame, err := c.out.Encrypt(frame, nil, p)
	if err != nil {
		return fmt.Errorf("noise: encrypt: %w", err)
	}
	c.buf = frame
	if c.limit > 0 {
		c.conn.SetWriteDeadline(time.Now().Add(c.limit))
	}
	_, err = c.conn.Write(frame)
	return err
}

// SetReadDeadline bounds the reads to come; SetWriteLimit bounds each write to come.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.conn.SetReadDeadline(t) }
func (c *Conn) SetWriteLimit(limit time.Duration) { c.limit = limit }
func (c *Conn) RemoteAddr() net.Addr              { return c.conn.RemoteAddr() }
func (c *Conn) Close() error                      { return c.conn.Close() }

func newConn(conn net.Conn) *Conn { return &Conn{conn: conn, r: bufio.NewReader(conn)} }

// deadlineOf puts ctx's deadline and cancellation on the connection; the function that it returns lifts them.
func (c *Conn) deadlineOf(ctx context.Context) (lift func()) {
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

// readFrame returns a frame of least to most bytes, valid until the next call. The length is judged before anything is
// allocated, the memory grows to the largest frame that a peer has really sent.
func (c *Conn) readFrame(least, most int) ([]byte, error) {
	var header [4]byte
	if _, err := io.ReadFull(c.r, header[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(header[:])
	if n < uint32(least) || n > uint32(most) {
		return nil, fmt.Errorf("%w: %d bytes, expected %d to %d", ErrFrame, n, least, most)
	}
	if cap(c.frame) < int(n) {
		c.frame = make([]byte, n)
	}
	c.frame = c.frame[:n]
	if _, err := io.ReadFull(c.r, c.frame); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return c.frame, nil
}

func (c *Conn) writeFrame(message []byte) error {
	_, err := c.conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(message))), message...))
	return err
}

func isReset(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && !op.Timeout()
}

// newHandshake prepares a handshake; with a server it is the initiator's. random is nil but for test vectors.
func newHandshake(ctx context.Context, static Static, profile Profile, server []byte, random io.Reader) (*noise.HandshakeState, error) {
	public := static.Public()
	return noise.NewHandshakeState(noise.Config{
		Random:        random,
		CipherSuite:   noise.NewCipherSuite(dh{ctx, static}, noise.CipherChaChaPoly, noise.HashBLAKE2s),
		Pattern:       noise.HandshakeIK,
		Initiator:     server != nil,
		Prologue:      []byte(profile),
		StaticKeypair: noise.DHKey{Private: []byte(handle), Public: public[:]},
		PeerStatic:    server,
	})
}

// handle stands where flynn/noise expects our static private key; it hands it back to dh.DH as it is. Ephemeral keys
// have 32 bytes, so the two can't be confused.
const handle = "static"

// dh is X25519 with the static private key behind Static. It lives for one handshake, whose context it carries.
type dh struct {
	ctx    context.Context
	static Static
}

func (d dh) GenerateKeypair(random io.Reader) (noise.DHKey, error) {
	return noise.DH25519.GenerateKeypair(random)
}

func (d dh) DH(private, public []byte) ([]byte, error) {
	if string(private) != handle {
		return noise.DH25519.DH(private, public)
	}
	shared, err := d.static.Exchange(d.ctx, [32]byte(public))
	return shared[:], err
}

func (d dh) DHLen() int     { return 32 }
func (d dh) DHName() string { return noise.DH25519.DHName() }
