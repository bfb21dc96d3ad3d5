package noise

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func identity(t testing.TB) *Identity {
	t.Helper()
	id, err := NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// vector is an IK exchange with fixed ephemeral keys. Both ends use their static key through
// staticHandle.
type vector struct {
	prologue                                 string
	initStatic, initEph, respStatic, respEph []byte
	payloads, ciphertexts                    [][]byte // messages 1 and 2, then the transport messages
	fromInit                                 []bool   // whether the initiator sends the message
	handshakeHash                            []byte
}

// run runs the exchange with flynn/noise alone, without frames.
func (v vector) run(t *testing.T) {
	initID, err := IdentityFrom(v.initStatic)
	if err != nil {
		t.Fatal(err)
	}
	respID, err := IdentityFrom(v.respStatic)
	if err != nil {
		t.Fatal(err)
	}
	respPub := respID.Public()
	ini, err := newHandshake(t.Context(), initID, Profile(v.prologue), respPub[:], bytes.NewReader(v.initEph))
	if err != nil {
		t.Fatal(err)
	}
	res, err := newHandshake(t.Context(), respID, Profile(v.prologue), nil, bytes.NewReader(v.respEph))
	if err != nil {
		t.Fatal(err)
	}
	equal := func(what string, got, want []byte) {
		t.Helper()
		if !bytes.Equal(got, want) {
			t.Errorf("%s:\n got %x\nwant %x", what, got, want)
		}
	}
	m1, _, _, err := ini.WriteMessage(nil, v.payloads[0])
	if err != nil {
		t.Fatal(err)
	}
	equal("message 1", m1, v.ciphertexts[0])
	p1, _, _, err := res.ReadMessage(nil, m1)
	if err != nil {
		t.Fatal(err)
	}
	equal("payload 1", p1, v.payloads[0])
	initPub := initID.Public()
	equal("peer static", res.PeerStatic(), initPub[:])
	m2, rIn, rOut, err := res.WriteMessage(nil, v.payloads[1])
	if err != nil {
		t.Fatal(err)
	}
	equal("message 2", m2, v.ciphertexts[1])
	p2, iOut, iIn, err := ini.ReadMessage(nil, m2)
	if err != nil {
		t.Fatal(err)
	}
	equal("payload 2", p2, v.payloads[1])
	equal("handshake hash", ini.ChannelBinding(), v.handshakeHash)
	for i := 2; i < len(v.payloads); i++ {
		out, in := rOut, iIn
		if v.fromInit[i] {
			out, in = iOut, rIn
		}
		c, err := out.Encrypt(nil, nil, v.payloads[i])
		if err != nil {
			t.Fatal(err)
		}
		equal("transport", c, v.ciphertexts[i])
		p, err := in.Decrypt(nil, nil, c)
		if err != nil {
			t.Fatal(err)
		}
		equal("plaintext", p, v.payloads[i])
	}
}

// TestPublicVectors runs the exchanges of a public file of test vectors, where the file is present.
func TestPublicVectors(t *testing.T) {
	b, err := os.ReadFile("../../shared/vectors/noise-ik-cacophony.json")
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("the public Noise vectors are not part of this repository; " +
			"put noise-ik-cacophony.json into ../shared/vectors to run them")
	} else if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Vectors []struct {
			Protocol   string `json:"protocol_name"`
			Prologue   string `json:"init_prologue"`
			InitStatic string `json:"init_static"`
			InitEph    string `json:"init_ephemeral"`
			RespStatic string `json:"resp_static"`
			RespEph    string `json:"resp_ephemeral"`
			Hash       string `json:"handshake_hash"`
			Messages   []struct{ Payload, Ciphertext string }
		}
	}
	if err := json.Unmarshal(b, &file); err != nil {
		t.Fatal(err)
	}
	ran := 0
	for _, f := range file.Vectors {
		if f.Protocol != "Noise_IK_25519_ChaChaPoly_BLAKE2s" {
			continue
		}
		v := vector{
			prologue: string(unhex(t, f.Prologue)), initStatic: unhex(t, f.InitStatic), initEph: unhex(t, f.InitEph),
			respStatic: unhex(t, f.RespStatic), respEph: unhex(t, f.RespEph), handshakeHash: unhex(t, f.Hash),
		}
		for i, m := range f.Messages {
			v.payloads = append(v.payloads, unhex(t, m.Payload))
			v.ciphertexts = append(v.ciphertexts, unhex(t, m.Ciphertext))
			v.fromInit = append(v.fromInit, i%2 == 0)
		}
		v.run(t)
		ran++
	}
	if ran == 0 {
		t.Error("no vector of our protocol in the file")
	}
}

// pair connects a client and a server over loopback TCP.
func pair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err = net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

type accepted struct {
	conn *Conn
	err  error
}

// accept runs Accept in the background and closes the connection after an error, as a server must.
func accept(t testing.TB, conn net.Conn, static Static, enrolled func([32]byte) bool) <-chan accepted {
	ch := make(chan accepted, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		c, err := Accept(ctx, conn, []Static{static}, CountersignV1, nil, enrolled)
		if err != nil {
			conn.Close()
		}
		ch <- accepted{c, err}
	}()
	return ch
}

// connected returns both ends of a connection after the handshake.
func connected(t testing.TB) (client, server *Conn) {
	t.Helper()
	c, s := pair(t)
	clientID, serverID := identity(t), identity(t)
	ch := accept(t, s, serverID, func(p [32]byte) bool { return p == clientID.Public() })
	client, err := Connect(t.Context(), c, clientID, CountersignV1, serverID.Public(), nil)
	if err != nil {
		t.Fatal(err)
	}
	a := <-ch
	if a.err != nil {
		t.Fatal(a.err)
	}
	if a.conn.Peer() != clientID.Public() || client.Peer() != serverID.Public() {
		t.Fatal("Peer() is another key")
	}
	return client, a.conn
}

// TestMessagesOfEverySize sends messages from 0 bytes to the limit, and one above the limit.
func TestMessagesOfEverySize(t *testing.T) {
	client, server := connected(t)
	for _, n := range []int{0, 1, 2, 1000, MaxPlaintext - 1, MaxPlaintext} {
		want := bytes.Repeat([]byte{byte(n)}, n)
		go client.WriteMessage(want)
		got, err := server.ReadMessage()
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes: got %d, %v", n, len(got), err)
		}
	}
	if err := client.WriteMessage(make([]byte, MaxPlaintext+1)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
	client.Close()
	if _, err := server.ReadMessage(); err != io.EOF {
		t.Errorf("after a clean close: %v, want EOF", err)
	}
}

// TestManyWritersOneReader checks that messages of concurrent writers arrive whole, and each
// writer's in order.
func TestManyWritersOneReader(t *testing.T) {
	client, server := connected(t)
	const writers, each = 8, 200
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				if err := client.WriteMessage(binary.BigEndian.AppendUint32([]byte{byte(w)}, uint32(i))); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	var next [writers]uint32
	for range writers * each {
		m, err := server.ReadMessage()
		if err != nil {
			t.Fatal(err)
		}
		if i := binary.BigEndian.Uint32(m[1:]); i != next[m[0]] {
			t.Fatalf("writer %d: message %d arrives as %d", m[0], i, next[m[0]])
		}
		next[m[0]]++
	}
	wg.Wait()
}

// TestStrangerGetsNotAByte checks that a peer without enrolment gets no response.
func TestStrangerGetsNotAByte(t *testing.T) {
	serverID := identity(t)
	c, s := pair(t)
	ch := accept(t, s, serverID, func([32]byte) bool { return false })
	_, err := Connect(t.Context(), c, identity(t), CountersignV1, serverID.Public(), nil)
	if !errors.Is(err, ErrHandshake) {
		t.Errorf("client: %v", err)
	}
	if a := <-ch; !errors.Is(a.err, ErrNotEnrolled) {
		t.Errorf("server: %v", a.err)
	}
}

// TestOtherKeyOrPrologueIsRefused connects with another server key, and with another prologue.
func TestOtherKeyOrPrologueIsRefused(t *testing.T) {
	enrolled := func([32]byte) bool {
		t.Error("the enrolled set was asked about a peer that proved nothing")
		return true
	}
	serverID := identity(t)
	c, s := pair(t)
	ch := accept(t, s, serverID, enrolled)
	_, err := Connect(t.Context(), c, identity(t), CountersignV1, identity(t).Public(), nil)
	if !errors.Is(err, ErrHandshake) {
		t.Errorf("another server key: %v", err)
	}
	<-ch
	c, s = pair(t)
	ch = accept(t, s, serverID, enrolled)
	server := serverID.Public()
	hs, err := newHandshake(t.Context(), identity(t), "countersign-v2", server[:], nil)
	if err != nil {
		t.Fatal(err)
	}
	message1, _, _, err := hs.WriteMessage(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(message1))), message1...))
	if n, err := io.Copy(io.Discard, c); n != 0 {
		t.Errorf("another prologue: %d bytes, %v", n, err)
	}
	if a := <-ch; !errors.Is(a.err, ErrHandshake) {
		t.Errorf("server: %v", a.err)
	}
}

// TestFramesOfImpossibleLength checks that a frame with an invalid length is refused by the length
// alone.
func TestFramesOfImpossibleLength(t *testing.T) {
	for _, n := range []uint32{0, 1, minMessage1 - 1, minMessage1 + 1, MaxMessage, MaxMessage + 1, 1 << 31, 1<<32 - 1} {
		c, s := pair(t)
		ch := accept(t, s, identity(t), func([32]byte) bool { return true })
		c.Write(binary.BigEndian.AppendUint32(nil, n))
		if a := <-ch; !errors.Is(a.err, ErrFrame) {
			t.Errorf("handshake frame of %d bytes: %v", n, a.err)
		}
	}
	for _, n := range []uint32{0, 15, MaxMessage + 1, 1<<32 - 1} {
		client, server := connected(t)
		client.conn.Write(binary.BigEndian.AppendUint32(nil, n))
		if _, err := server.ReadMessage(); !errors.Is(err, ErrFrame) {
			t.Errorf("transport frame of %d bytes: %v", n, err)
		}
	}
}

// tamperConn flips one bit of the written byte number at.
type tamperConn struct {
	net.Conn
	at int
}

func (c *tamperConn) Write(p []byte) (int, error) {
	if c.at >= 0 && c.at < len(p) {
		p = bytes.Clone(p)
		p[c.at] ^= 0x40
	}
	c.at -= len(p)
	return c.Conn.Write(p)
}

// TestEveryFlippedByteIsRefused changes each byte of message 1, message 2 and a transport message
// in turn.
func TestEveryFlippedByteIsRefused(t *testing.T) {
	clientID, serverID := identity(t), identity(t)
	enrolled := func(p [32]byte) bool { return p == clientID.Public() }
	for at := range 4 + minMessage1 {
		c, s := pair(t)
		ch := accept(t, s, serverID, enrolled)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		client, err := Connect(ctx, &tamperConn{c, at}, clientID, CountersignV1, serverID.Public(), nil)
		cancel()
		c.Close()
		if a := <-ch; a.err == nil || err == nil {
			t.Fatalf("message 1, byte %d: server %v, client %v %v", at, a.err, client, err)
		}
	}
	for at := range 4 + minMessage2 {
		c, s := pair(t)
		ch := accept(t, &tamperConn{s, at}, serverID, enrolled)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		if at < 4 {
			// With a changed length the client may wait for more bytes, until the deadline.
			ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
		}
		_, err := Connect(ctx, c, clientID, CountersignV1, serverID.Public(), nil)
		cancel()
		if err == nil {
			t.Fatalf("message 2, byte %d: accepted", at)
		}
		<-ch
	}
	for at := 4; at < 4+5+tagSize; at++ {
		client, server := connected(t)
		client.conn = &tamperConn{client.conn, at}
		client.WriteMessage([]byte("hello"))
		if m, err := server.ReadMessage(); !errors.Is(err, ErrDecrypt) {
			t.Fatalf("transport, byte %d: %q, %v", at, m, err)
		}
	}
}

// TestReplayedTransportMessageIsRefused sends a transport message twice.
func TestReplayedTransportMessageIsRefused(t *testing.T) {
	client, server := connected(t)
	var captured bytes.Buffer
	client.conn = &teeConn{client.conn, &captured}
	client.WriteMessage([]byte("once"))
	if _, err := server.ReadMessage(); err != nil {
		t.Fatal(err)
	}
	client.conn.(*teeConn).Conn.Write(captured.Bytes())
	if m, err := server.ReadMessage(); !errors.Is(err, ErrDecrypt) {
		t.Errorf("replayed: %q, %v", m, err)
	}
}

// teeConn copies all written bytes.
type teeConn struct {
	net.Conn
	to *bytes.Buffer
}

func (c *teeConn) Write(p []byte) (int, error) {
	c.to.Write(p)
	return c.Conn.Write(p)
}

// TestSilentPeerIsCutOff checks that the context's deadline or cancellation ends a handshake with a
// silent peer.
func TestSilentPeerIsCutOff(t *testing.T) {
	_, s := pair(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := Accept(ctx, s, []Static{identity(t)}, CountersignV1, nil, func([32]byte) bool { return true })
	var netErr net.Error
	if !errors.As(err, &netErr) || !netErr.Timeout() {
		t.Errorf("deadline: %v", err)
	}
	c, _ := pair(t)
	ctx, cancel = context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := Connect(ctx, c, identity(t), CountersignV1, identity(t).Public(), nil)
		done <- err
	}()
	cancel()
	if err := <-done; err == nil {
		t.Error("cancelled: accepted")
	}
}

// TestLowOrderEphemeral sends a point of low order as the ephemeral key, which would make the
// shared secret predictable.
func TestLowOrderEphemeral(t *testing.T) {
	c, s := pair(t)
	ch := accept(t, s, identity(t), func([32]byte) bool { return true })
	c.Write(append(binary.BigEndian.AppendUint32(nil, minMessage1), make([]byte, minMessage1)...))
	if a := <-ch; !errors.Is(a.err, ErrHandshake) {
		t.Errorf("%v", a.err)
	}
}

// TestNext: the length of a message is known before the message is read. A length that no message
// has is ErrFrame at once.
func TestNext(t *testing.T) {
	for header, want := range map[string]struct {
		length int
		err    error
	}{
		"\x00\x00\x00\x10": {0, nil}, "\x00\x00\x00\x11": {1, nil}, "\x00\x00\xff\xff": {MaxPlaintext, nil},
		"\x00\x00\x00\x0f": {0, ErrFrame}, "\x00\x01\x00\x00": {0, ErrFrame}, "\xff\xff\xff\xff": {0, ErrFrame},
		"": {0, io.EOF}, "\x00\x00\x00": {0, io.ErrUnexpectedEOF},
	} {
		ours, theirs := net.Pipe()
		go func() {
			theirs.Write([]byte(header))
			theirs.Close()
		}()
		n, err := newConn(ours).Next()
		if !errors.Is(err, want.err) || err == nil && n != want.length {
			t.Errorf("%x: %d, %v; want %d, %v", header, n, err, want.length, want.err)
		}
	}
}

// TestFrameBufferGrowsWithWhatArrives: a header that announces the longest message costs the memory
// of the first part only, as long as no more has arrived.
func TestFrameBufferGrowsWithWhatArrives(t *testing.T) {
	sent := bytes.Repeat([]byte("0123456789abcdef"), MaxMessage/16+1)[:MaxMessage]
	for _, arrived := range []int{0, 1, firstPart, firstPart + 1, 20_000, MaxMessage} {
		ours, theirs := net.Pipe()
		go func() {
			theirs.Write(append([]byte{0, 0, 0xff, 0xff}, sent[:arrived]...))
			theirs.Close()
		}()
		c := newConn(ours)
		frame, err := c.readFrame(tagSize, MaxMessage)
		if arrived < MaxMessage && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d bytes: %v", arrived, err)
		}
		if arrived == MaxMessage && (err != nil || !bytes.Equal(frame, sent)) {
			t.Errorf("the whole frame: %v", err)
		}
		if most := max(2*firstPart, 5*arrived/2); cap(c.frame) > most {
			t.Errorf("%d bytes have arrived, and the buffer has %d, more than %d", arrived, cap(c.frame), most)
		}
	}
}

// twisted is an identity with its public key in another encoding: X25519 ignores the top bit.
type twisted struct{ *Identity }

func (i twisted) Public() (key [32]byte) {
	key = i.Identity.Public()
	key[31] |= 0x80
	return key
}

// TestSecondEncodingOfAPeersKey connects by a second encoding of a static key. A ledger of an older
// version may have the second encoding as another peer.
func TestSecondEncodingOfAPeersKey(t *testing.T) {
	me, server := identity(t), identity(t)
	for _, static := range []Static{me, twisted{me}} {
		c, s := pair(t)
		ch := accept(t, s, server, func(peer [32]byte) bool { return peer == static.Public() })
		_, err := Connect(t.Context(), c, static, CountersignV1, server.Public(), nil)
		got := <-ch
		canonical := static == Static(me)
		if (err == nil) != canonical || errors.Is(got.err, ErrNotEnrolled) == canonical {
			t.Errorf("%x: %v, %v", static.Public(), err, got.err)
		}
	}
}

// TestPrivateKeyOfZeros reads the private key that everybody has.
func TestPrivateKeyOfZeros(t *testing.T) {
	if _, err := IdentityFrom(make([]byte, 32)); err == nil {
		t.Error("32 zeros are an identity")
	}
}
