package hsm

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"

	"countersign/keystore"

	"github.com/miekg/pkcs11"
)

// PKCS#11 v3.0 numbers that miekg/pkcs11 lacks.
const (
	ckkECEdwards           = 0x40
	ckmECEdwardsKeyPairGen = 0x1055
	ckmEdDSA               = 0x1057
)

// labelPrefix marks our objects on a token that others may use too. CKA_LABEL is the prefix and the reference, CKA_ID is
// the tag of the creation.
const labelPrefix = "countersign/"

// curve is what an algorithm needs to know of the token. SoftHSM makes X25519 keys of type CKK_EC_EDWARDS too.
type curve struct {
	alg      keystore.Algorithm
	oid      []byte // CKA_EC_PARAMS as a DER object identifier (RFC 8410)
	name     string // CKA_EC_PARAMS as a DER PrintableString
	use      uint   // the one mechanism that the key may be used with
	signs    bool
	exchange bool
}

var curves = []curve{
	{alg: keystore.Ed25519, oid: []byte{0x06, 0x03, 0x2b, 0x65, 0x70}, name: "edwards25519", use: ckmEdDSA, signs: true},
	{alg: keystore.X25519, oid: []byte{0x06, 0x03, 0x2b, 0x65, 0x6e}, name: "curve25519", use: pkcs11.CKM_ECDH1_DERIVE, exchange: true},
}

// key is a keystore.Key. The handle is a cache: valid in one generation of the module, found again by CKA_ID in another.
type key struct {
	store  *Store
	info   keystore.Info
	id     []byte
	handle atomic.Pointer[handle]
}

type handle struct {
	private    pkcs11.ObjectHandle
	generation uint64
}

func (k *key) Info() keystore.Info { return k.info }

func (k *key) Sign(ctx context.Context, message []byte) (signature []byte, err error) {
	if k.info.Algorithm != keystore.Ed25519 {
		return nil, fmt.Errorf("hsm: %v is not a signing key", k.info.Ref)
	}
	var result []byte
	err = k.use(ctx, "sign", func(s session, private pkcs11.ObjectHandle) (err error) {
		result, err = k.store.sign(s, private, message)
		return err
	})
	if err != nil {
		return nil, err // the module may still be at it: result is not ours to read
	}
	return result, nil
}

func (k *key) Exchange(ctx context.Context, peer [32]byte) (shared [32]byte, err error) {
	if k.info.Algorithm != keystore.X25519 {
		return shared, fmt.Errorf("hsm: %v is not an exchange key", k.info.Ref)
	}
	if keystore.LowOrder(peer) {
		return shared, keystore.ErrPeerKey
	}
	var result [32]byte
	err = k.use(ctx, "exchange", func(s session, private pkcs11.ObjectHandle) (err error) {
		result, err = k.store.derive(s, private, peer)
		return err
	})
	if err != nil {
		return shared, err
	}
	return result, nil
}

func (st *Store) sign(s session, private pkcs11.ObjectHandle, message []byte) ([]byte, error) {
	if err := st.module.SignInit(s.handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(ckmEdDSA, nil)}, private); err != nil {
		return nil, deviceError("C_SignInit", err)
	}
	signature, err := st.module.Sign(s.handle, message)
	if err != nil {
		return nil, deviceError("C_Sign", err)
	}
	if len(signature) != ed25519.SignatureSize {
		return nil, fmt.Errorf("%w: C_Sign: a signature of %d bytes", keystore.ErrUnavailable, len(signature))
	}
	return signature, nil
}

// derive makes the shared secret as a session object, reads it and destroys it.
func (st *Store) derive(s session, private pkcs11.ObjectHandle, peer [32]byte) (shared [32]byte, err error) {
	mechanism := pkcs11.NewMechanism(pkcs11.CKM_ECDH1_DERIVE, pkcs11.NewECDH1DeriveParams(pkcs11.CKD_NULL, nil, peer[:]))
	secret, err := st.module.DeriveKey(s.handle, []*pkcs11.Mechanism{mechanism}, private, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, len(shared)),
	})
	if err != nil {
		return shared, deviceError("C_DeriveKey", err)
	}
	value, err := st.attributes(s, secret, pkcs11.CKA_VALUE)
	if destroyed := st.module.DestroyObject(s.handle, secret); destroyed != nil && err == nil {
		err = deviceError("C_DestroyObject", destroyed)
	}
	if err == nil && len(value[0]) != len(shared) {
		err = fmt.Errorf("%w: C_DeriveKey: a secret of %d bytes", keystore.ErrUnavailable, len(value[0]))
	}
	if err != nil {
		return shared, err
	}
	copy(shared[:], value[0])
	clear(value[0])
	if shared == ([32]byte{}) {
		return shared, keystore.ErrPeerKey
	}
	return shared, nil
}

// use runs f with a session and the private key's handle, which it finds again where the module has been restarted.
func (k *key) use(ctx context.Context, doing string, f func(session, pkcs11.ObjectHandle) error) error {
	doing = fmt.Sprintf("%s with %v", doing, k.info.Ref)
	return k.store.do(ctx, doing, func(s session) error {
		h := k.handle.Load()
		if h == nil || h.generation != s.generation {
			found, err := k.store.load(s, k.info.Ref)
			if err != nil { // it was there and whole: the token is away, or nobody is logged in and sees half of it
				return fmt.Errorf("%w: %w", keystore.ErrUnavailable, err)
			}
			if !bytes.Equal(found.info.PublicKey, k.info.PublicKey) || !bytes.Equal(found.id, k.id) {
				return fmt.Errorf("%w: the token has another key under this name now", keystore.ErrUnfit)
			}
			h = found.handle.Load()
			k.handle.Store(h)
		}
		err := f(s, h.private)
		if errors.Is(err, keystore.ErrUnavailable) {
			k.handle.CompareAndSwap(h, nil) // it may be the handle: find it again
		}
		return err
	})
}

func (st *Store) Key(ctx context.Context, ref keystore.Ref) (keystore.Key, error) {
	var result *key
	err := st.do(ctx, fmt.Sprintf("find %v", ref), func(s session) (err error) {
		result, err = st.load(s, ref)
		return err
	})
	if err != nil {
		return nil, err
	}
	return result, nil
}

func (st *Store) Keys(ctx context.Context) ([]keystore.Info, error) {
	var result []keystore.Info
	err := st.do(ctx, "list keys", func(s session) error {
		objects, err := st.find(s, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY))
		if err != nil {
			return err
		}
		var infos []keystore.Info
		for _, o := range objects {
			v, err := st.attributes(s, o, pkcs11.CKA_LABEL)
			if err != nil {
				return err
			}
			text, ours := strings.CutPrefix(string(v[0]), labelPrefix)
			ref, err := keystore.ParseRef(text)
			if !ours || err != nil {
				continue
			}
			if k, err := st.load(s, ref); err == nil {
				infos = append(infos, k.info)
			} else if errors.Is(err, keystore.ErrUnavailable) {
				return err
			}
		}
		result = infos
		return nil
	})
	if err != nil {
		return nil, err
	}
	return result, nil
}

// load finds the two objects of a key by their label: exactly one private and one public, of one CKA_ID and one curve,
// the private one sensitive and not extractable.
func (st *Store) load(s session, ref keystore.Ref) (*key, error) {
	private, public, err := st.pair(s, ref)
	if err != nil {
		return nil, err
	}
	switch {
	case len(private) == 0 && len(public) == 0:
		return nil, fmt.Errorf("%v: %w", ref, keystore.ErrNotFound)
	case len(private) > 1 || len(public) > 1:
		return nil, fmt.Errorf("%v: %w: %d private and %d public objects are labelled %q; list them with pkcs11-tool --list-objects and delete what is not ours",
			ref, keystore.ErrAmbiguous, len(private), len(public), labelPrefix+ref.String())
	case len(private) == 0 || len(public) == 0:
		return nil, fmt.Errorf("%v: %w: only half of the pair labelled %q is on the token", ref, keystore.ErrUnfit, labelPrefix+ref.String())
	}
	pub, err := st.attributes(s, public[0], pkcs11.CKA_ID, pkcs11.CKA_EC_PARAMS, pkcs11.CKA_EC_POINT)
	if err != nil {
		return nil, err
	}
	prv, err := st.attributes(s, private[0], pkcs11.CKA_ID, pkcs11.CKA_SENSITIVE, pkcs11.CKA_EXTRACTABLE,
		pkcs11.CKA_LOCAL, pkcs11.CKA_ALWAYS_SENSITIVE, pkcs11.CKA_NEVER_EXTRACTABLE)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(pub[0], prv[0]) || len(prv[0]) == 0 {
		return nil, fmt.Errorf("%v: %w: its private and public objects do not belong together", ref, keystore.ErrUnfit)
	}
	if !isTrue(prv[1]) || isTrue(prv[2]) {
		return nil, fmt.Errorf("%v: %w: it must be CKA_SENSITIVE and not CKA_EXTRACTABLE", ref, keystore.ErrUnfit)
	}
	c, ok := curveOf(pub[1])
	if !ok {
		return nil, fmt.Errorf("%v: %w: its curve %x is not known here", ref, keystore.ErrUnfit, pub[1])
	}
	point := pub[2]
	if len(point) == 34 && point[0] == 0x04 && point[1] == 32 { // DER OCTET STRING
		point = point[2:]
	}
	if len(point) != 32 {
		return nil, fmt.Errorf("%v: %w: a public key of %d bytes", ref, keystore.ErrUnfit, len(point))
	}
	k := &key{store: st, id: prv[0], info: keystore.Info{
		Ref: ref, Algorithm: c.alg, PublicKey: point, Custody: keystore.HSMResident,
		Generated: isTrue(prv[3]), NeverLeft: isTrue(prv[4]) && isTrue(prv[5]),
	}}
	k.handle.Store(&handle{private[0], s.generation})
	return k, nil
}

// pair finds all private and all public objects under a name.
func (st *Store) pair(s session, ref keystore.Ref) (private, public []pkcs11.ObjectHandle, err error) {
	label := pkcs11.NewAttribute(pkcs11.CKA_LABEL, labelPrefix+ref.String())
	if private, err = st.find(s, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), label); err != nil {
		return nil, nil, err
	}
	public, err = st.find(s, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), label)
	return private, public, err
}

func (st *Store) Generate(ctx context.Context, ref keystore.Ref, alg keystore.Algorithm, tag keystore.Tag) (keystore.Key, error) {
	var c *curve
	for i := range curves {
		if curves[i].alg == alg {
			c = &curves[i]
		}
	}
	if c == nil {
		return nil, fmt.Errorf("hsm: generate %v: unknown algorithm %q", ref, alg)
	}
	if err := keystore.CheckName(ref.Name); err != nil {
		return nil, fmt.Errorf("hsm: generate %v: %w", ref, err)
	}
	var result *key
	err := st.do(ctx, fmt.Sprintf("generate %v", ref), func(s session) error {
		private, public, err := st.pair(s, ref)
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%w: %w", keystore.ErrUnavailable, ctx.Err()) // nobody waits for this key any more
		}
		if len(private)+len(public) > 0 {
			return fmt.Errorf("%w: %d objects are labelled %q", keystore.ErrExists, len(private)+len(public), labelPrefix+ref.String())
		}
		k, err := st.generate(s, ref, c, tag)
		if err != nil {
			// Best effort: what remains can't be used, since nobody records it, and Destroy removes it later.
			return errors.Join(err, st.destroy(s, ref, tag))
		}
		result = k
		return nil
	})
	if err != nil {
		return nil, err
	}
	return result, nil
}

// generate makes the pair with every usage flag set by name, since the defaults of modules differ and are wide; then it
// reads back what the token made of it and proves the key by using it.
func (st *Store) generate(s session, ref keystore.Ref, c *curve, tag keystore.Tag) (*key, error) {
	common := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, labelPrefix+ref.String()),
		pkcs11.NewAttribute(pkcs11.CKA_ID, tag[:]),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, ckkECEdwards),
		pkcs11.NewAttribute(pkcs11.CKA_MODIFIABLE, false),
	}
	public := append([]*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, c.oid),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
		pkcs11.NewAttribute(pkcs11.CKA_VERIFY, c.signs),
		pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, false),
		pkcs11.NewAttribute(pkcs11.CKA_WRAP, false),
		pkcs11.NewAttribute(pkcs11.CKA_DERIVE, false),
	}, common...)
	private := append([]*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_SIGN, c.signs),
		pkcs11.NewAttribute(pkcs11.CKA_DERIVE, c.exchange),
		pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, false),
		pkcs11.NewAttribute(pkcs11.CKA_SIGN_RECOVER, false),
		pkcs11.NewAttribute(pkcs11.CKA_UNWRAP, false),
		pkcs11.NewAttribute(pkcs11.CKA_ALLOWED_MECHANISMS, pkcs11.NewAttribute(0, c.use).Value),
	}, common...)
	mechanism := []*pkcs11.Mechanism{pkcs11.NewMechanism(ckmECEdwardsKeyPairGen, nil)}
	if _, _, err := st.module.GenerateKeyPair(s.handle, mechanism, public, private); err != nil {
		return nil, deviceError("C_GenerateKeyPair", err)
	}
	k, err := st.load(s, ref)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(k.id, tag[:]) || k.info.Algorithm != c.alg || !k.info.Generated || !k.info.NeverLeft {
		return nil, fmt.Errorf("%w: the token made it with other attributes than it was asked for", keystore.ErrUnfit)
	}
	return k, st.prove(s, k)
}

// prove uses a new key once and checks the result in Go: a key that can't do that must not come into use.
func (st *Store) prove(s session, k *key) error {
	private := k.handle.Load().private
	if k.info.Algorithm == keystore.Ed25519 {
		challenge := []byte("countersign: proof of a new key\x00" + k.info.Ref.String())
		sig, err := st.sign(s, private, challenge)
		if err != nil {
			return err
		}
		if !ed25519.Verify(k.info.PublicKey, challenge, sig) {
			return fmt.Errorf("%w: the new key signs wrongly", keystore.ErrUnfit)
		}
		return nil
	}
	peer, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	public, err := ecdh.X25519().NewPublicKey(k.info.PublicKey)
	if err != nil {
		return err
	}
	want, err := peer.ECDH(public)
	if err != nil {
		return err
	}
	got, err := st.derive(s, private, [32]byte(peer.PublicKey().Bytes()))
	if err != nil {
		return err
	}
	if !bytes.Equal(got[:], want) {
		return fmt.Errorf("%w: the new key exchanges wrongly", keystore.ErrUnfit)
	}
	return nil
}

func (st *Store) Destroy(ctx context.Context, ref keystore.Ref, tag keystore.Tag) error {
	return st.do(ctx, fmt.Sprintf("destroy %v", ref), func(s session) error { return st.destroy(s, ref, tag) })
}

// destroy removes the objects of a label that carry the tag as their CKA_ID.
func (st *Store) destroy(s session, ref keystore.Ref, tag keystore.Tag) error {
	objects, err := st.find(s, pkcs11.NewAttribute(pkcs11.CKA_LABEL, labelPrefix+ref.String()), pkcs11.NewAttribute(pkcs11.CKA_ID, tag[:]))
	if err != nil {
		return err
	}
	for _, o := range objects {
		if err := st.module.DestroyObject(s.handle, o); err != nil {
			return deviceError("C_DestroyObject", err)
		}
	}
	return nil
}

// find returns all objects that match.
func (st *Store) find(s session, template ...*pkcs11.Attribute) (found []pkcs11.ObjectHandle, err error) {
	if err := st.module.FindObjectsInit(s.handle, template); err != nil {
		return nil, deviceError("C_FindObjectsInit", err)
	}
	defer func() {
		if final := st.module.FindObjectsFinal(s.handle); final != nil && err == nil {
			err = deviceError("C_FindObjectsFinal", final)
		}
	}()
	for {
		some, _, err := st.module.FindObjects(s.handle, 64)
		if err != nil {
			return nil, deviceError("C_FindObjects", err)
		}
		if len(some) == 0 {
			return found, nil
		}
		found = append(found, some...)
	}
}

// attributes reads attributes of an object in the order in which they are asked for.
func (st *Store) attributes(s session, o pkcs11.ObjectHandle, types ...uint) ([][]byte, error) {
	var template []*pkcs11.Attribute
	for _, t := range types {
		template = append(template, pkcs11.NewAttribute(t, nil))
	}
	got, err := st.module.GetAttributeValue(s.handle, o, template)
	if err != nil {
		return nil, deviceError("C_GetAttributeValue", err)
	}
	values := make([][]byte, len(got))
	for i, a := range got {
		values[i] = a.Value
	}
	return values, nil
}

func curveOf(params []byte) (curve, bool) {
	for _, c := range curves {
		printable := append([]byte{0x13, byte(len(c.name))}, c.name...)
		if bytes.Equal(params, c.oid) || bytes.Equal(params, printable) {
			return c, true
		}
	}
	return curve{}, false
}

func isTrue(v []byte) bool { return len(v) == 1 && v[0] != 0 }
