package hsm

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"

	"countersign/internal/keystore"
	"countersign/internal/pubkey"
	"countersign/internal/secret"

	"github.com/miekg/pkcs11"
)

// PKCS#11 v2.40 and v3.0 numbers that miekg/pkcs11 lacks.
const (
	ckkECEdwards              = 0x40
	ckkECMontgomery           = 0x41
	ckmECEdwardsKeyPairGen    = 0x1055
	ckmECMontgomeryKeyPairGen = 0x1056
	ckmEdDSA                  = 0x1057
	ckrActionProhibited       = 0x1b
	ckrCurveNotSupported      = 0x140
)

// labelPrefix marks the appliance's objects on a token shared with other programs. CKA_LABEL is the
// prefix and the key's reference, for example countersign/payments/1. CKA_ID is the tag of the
// creation.
const labelPrefix = "countersign/"

// attr makes an attribute of a template.
func attr(typ uint, value any) *pkcs11.Attribute { return pkcs11.NewAttribute(typ, value) }

// curve has the PKCS#11 parameters of an algorithm.
type curve struct {
	alg       keystore.Algorithm
	oid       []byte // CKA_EC_PARAMS as a DER object identifier (RFC 8410, RFC 5480)
	name      string // CKA_EC_PARAMS as a DER PrintableString
	keygen    uint   // mechanism of C_GenerateKeyPair
	operation uint   // the only mechanism allowed for the key's use
	kind      uint   // CKA_KEY_TYPE
	point     int    // length of a public key in bytes
}

var curves = []curve{
	{keystore.Ed25519, []byte{0x06, 0x03, 0x2b, 0x65, 0x70}, "edwards25519",
		ckmECEdwardsKeyPairGen, ckmEdDSA, ckkECEdwards, 32},
	{keystore.X25519, []byte{0x06, 0x03, 0x2b, 0x65, 0x6e}, "curve25519",
		ckmECMontgomeryKeyPairGen, pkcs11.CKM_ECDH1_DERIVE, ckkECMontgomery, 32},
	{keystore.P256, []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}, "secp256r1",
		pkcs11.CKM_EC_KEY_PAIR_GEN, pkcs11.CKM_ECDSA, pkcs11.CKK_EC, 65},
}

// curveFor returns the curve of an algorithm, adapted to the token's quirks.
func (st *Store) curveFor(alg keystore.Algorithm) (curve, error) {
	for _, c := range curves {
		if c.alg == alg {
			if alg == keystore.X25519 && st.quirks.X25519 == "edwards" {
				c.keygen, c.kind = ckmECEdwardsKeyPairGen, ckkECEdwards
			}
			return c, nil
		}
	}
	return curve{}, fmt.Errorf("hsm: unknown algorithm %q: use one of %v", alg, keystore.Algorithms)
}

// params returns CKA_EC_PARAMS in the token's form. Only the curves of RFC 8410 may have a name:
// YubiHSM and SoftHSM refuse a name for P-256.
func (st *Store) params(c curve) []byte {
	if st.quirks.ECParams == "name" && c.alg != keystore.P256 {
		return c.printable()
	}
	return c.oid
}

func (c curve) printable() []byte { return append([]byte{0x13, byte(len(c.name))}, c.name...) }

// key is a keystore.Key. The store caches the token's handle of the key by the key's tag.
type key struct {
	store *Store
	info  keystore.Info
}

// handle is a cached handle of a private object. A handle is valid during one login.
type handle struct {
	ref     keystore.Ref
	alg     keystore.Algorithm
	public  []byte
	private pkcs11.ObjectHandle
	logins  uint64 // value of Store.logins at the lookup
	missing bool   // the lookup failed after every recovery step; other fields than ref are zero
}

func (k *key) Info() keystore.Info { return k.info }

func (st *Store) Bind(info keystore.Info) keystore.Key { return &key{st, info} }

func (k *key) Exchange(ctx context.Context, peer [32]byte) (shared [32]byte, err error) {
	if k.info.Algorithm != keystore.X25519 {
		return shared, fmt.Errorf("hsm: %v: %w: it is not an exchange key", k.info.Ref, keystore.ErrRefused)
	}
	if pubkey.LowOrder(peer) {
		return shared, keystore.ErrPeerKey
	}
	err = k.use(ctx, "exchange", func(s session, h *handle) (err error) {
		shared, err = k.store.direct.derive(s.handle, h.private, peer)
		return err
	})
	if err == nil && shared == ([32]byte{}) {
		err = keystore.ErrPeerKey
	}
	if err != nil {
		return [32]byte{}, err
	}
	return shared, nil
}

// use runs f with a session and the private key's handle. The key is looked up on the token once
// per login; later uses find the handle in the cache.
func (k *key) use(ctx context.Context, operation string, f func(session, *handle) error) error {
	st := k.store
	err := st.withSession(ctx, operation+" with "+k.info.Ref.String(), func(s session) error {
		logins := st.logins.Load()
		h := k.handle(logins)
		if h == nil {
			found, err := st.findBound(s, k.info)
			if errors.Is(err, errLost) && k.knownMissing() {
				return fmt.Errorf("%w: %v", keystore.ErrNotFound, err) // every recovery step was tried before
			} else if err != nil {
				return err
			}
			h = &handle{
				ref: k.info.Ref, alg: k.info.Algorithm, public: k.info.PublicKey, private: found, logins: logins,
			}
			st.handles.Store(k.info.Tag, h)
		}
		err := f(s, h)
		if err != nil && !errors.Is(err, keystore.ErrPeerKey) {
			st.forget(s, k.info.Tag, h) // the handle may be the cause: look the key up again
		}
		return err
	})
	if errors.Is(err, errLost) {
		st.handles.Store(k.info.Tag, &handle{ref: k.info.Ref, missing: true})
	}
	return err
}

// cached returns the key's entry in the cache, or nil.
func (k *key) cached() *handle {
	cached, _ := k.store.handles.Load(k.info.Tag)
	h, _ := cached.(*handle)
	return h
}

// handle returns the key's cached handle if the handle is valid during the given login, or nil. The
// handle must be of this description: another name for the same tag has not been compared with the
// label on the token.
func (k *key) handle(logins uint64) *handle {
	h := k.cached()
	if h == nil || h.logins != logins || h.missing || h.ref != k.info.Ref || h.alg != k.info.Algorithm ||
		!bytes.Equal(h.public, k.info.PublicKey) {
		return nil
	}
	return h
}

// knownMissing reports a lookup of the key that failed after every recovery step. Such a key has no
// further recovery, whatever logins come later: the recovery from one missing key is a new login
// for another, and all keys of the token would wait for one re-initialisation after another. Each
// use looks on the token once, so a restored key is found.
func (k *key) knownMissing() bool {
	h := k.cached()
	return h != nil && h.missing
}

// forget drops a tag's handle from the cache. With Quirks.Copies it also destroys the copied key
// behind the handle.
func (st *Store) forget(s session, tag keystore.Tag, h *handle) {
	if st.handles.CompareAndDelete(tag, h) && st.quirks.Copies == "on" && h.logins == st.logins.Load() && !h.missing {
		st.module.DestroyObject(s.handle, h.private)
	}
}

// findBound looks up the key of a description and returns the private object to use. With
// Quirks.Copies the object is a copy owned by the login session.
func (st *Store) findBound(s session, info keystore.Info) (pkcs11.ObjectHandle, error) {
	found, err := st.lookup(s, info)
	if errors.Is(err, keystore.ErrNotFound) {
		return 0, fmt.Errorf("%v: %w", info.Ref, errLost)
	} else if errors.Is(err, keystore.ErrAmbiguous) {
		// SoftHSM was seen to show one object under two handles during concurrent logins.
		return 0, fmt.Errorf("%w: %w", errLost, err)
	} else if err != nil {
		return 0, err
	}
	if st.quirks.Copies == "on" {
		st.copyMu.Lock() // a session runs one operation at a time
		defer st.copyMu.Unlock()
		sessionObject := []*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, false)}
		if copied, err := st.module.CopyObject(st.loginSession(), found.handle, sessionObject); err == nil {
			return copied, nil
		}
	}
	return found.handle, nil
}

func (st *Store) Key(ctx context.Context, ref keystore.Ref) (keystore.Key, error) {
	var info keystore.Info
	err := st.withSession(ctx, fmt.Sprintf("find %v", ref), func(s session) (err error) {
		if info, err = st.describe(s, ref); err != nil {
			st.handles.Range(func(tag, h any) bool { // a copied key must not outlive the original
				if h := h.(*handle); h.ref == ref && !h.missing {
					st.forget(s, tag.(keystore.Tag), h)
				}
				return true
			})
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return st.Bind(info), nil
}

func (st *Store) Keys(ctx context.Context) (refs []keystore.Ref, err error) {
	err = st.withSession(ctx, "list keys", func(s session) error {
		refs = nil
		all, err := st.objects(s)
		for _, same := range byLabel(all) {
			text, ours := strings.CutPrefix(same[0].label, labelPrefix)
			ref, err := keystore.ParseRef(text)
			if ours && err == nil && len(same) == 1 && same[0].sound() == nil {
				refs = append(refs, ref)
			}
		}
		return err
	})
	return refs, err
}

// few is the number of keys that are searched one by one, rather than by a listing.
const few = 4

// Compare keeps the handles of the keys that fit, for their first uses.
func (st *Store) Compare(ctx context.Context, infos []keystore.Info) (faults []error, err error) {
	err = st.withSession(ctx, "compare keys", func(s session) error {
		logins := st.logins.Load()
		faults = make([]error, len(infos))
		var listed map[string][]object
		if len(infos) > few {
			all, err := st.objects(s)
			if err != nil {
				return err
			}
			listed = byLabel(all)
		}
		for i, info := range infos {
			same := listed[labelPrefix+info.Ref.String()]
			if listed == nil {
				if same, err = st.objects(s, labelOf(info.Ref)); err != nil {
					return err
				}
			}
			found, err := only(info.Ref, same)
			if err == nil {
				err = found.fits(info)
			}
			if err == nil {
				st.seen.Store(info.Tag, seen{found, logins})
			}
			faults[i] = err
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return faults, nil
}

func labelOf(ref keystore.Ref) *pkcs11.Attribute {
	return attr(pkcs11.CKA_LABEL, labelPrefix+ref.String())
}

// errHalfPair reports a private object without its public object.
var errHalfPair = errors.New("only half of the pair is on the token: the public object is missing")

// object is a private object on the token that only the PIN shows: an object with CKA_PRIVATE false
// may be anybody's. Public objects do not count either. The key's public half is what the ledger
// says, and a private object that does not prove it is another key.
type object struct {
	handle     pkcs11.ObjectHandle
	id         []byte
	label      string
	alg        keystore.Algorithm // "": of another kind than the appliance's keys, or not told
	kept       bool               // CKA_SENSITIVE and not CKA_EXTRACTABLE
	provenance keystore.Provenance
}

// seen is an object of Compare whose key has not been used yet. The handle is valid during one
// login.
type seen struct {
	object
	logins uint64
}

// objects finds the private objects with the attributes of a template, or all.
func (st *Store) objects(s session, template ...*pkcs11.Attribute) (all []object, err error) {
	handles, err := st.find(s, append(template, attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_PRIVATE, true))...)
	if err != nil {
		return nil, err
	}
	for _, h := range handles {
		v, err := st.direct.attributes(s.handle, h, pkcs11.CKA_LABEL, pkcs11.CKA_ID, pkcs11.CKA_SENSITIVE,
			pkcs11.CKA_EXTRACTABLE, pkcs11.CKA_EC_PARAMS, pkcs11.CKA_LOCAL, pkcs11.CKA_ALWAYS_SENSITIVE,
			pkcs11.CKA_NEVER_EXTRACTABLE)
		if isCode(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
			continue // another program has deleted the object meanwhile
		} else if err != nil {
			return nil, err
		}
		c, _ := curveOf(v[4])
		all = append(all, object{
			handle: h, label: string(v[0]), id: v[1], alg: c.alg, kept: isTrue(v[2]) && !isTrue(v[3]),
			provenance: keystore.Provenance{
				Local: isTrue(v[5]), AlwaysSensitive: isTrue(v[6]), NeverExtractable: isTrue(v[7]),
			},
		})
	}
	return all, nil
}

func byLabel(all []object) map[string][]object {
	sorted := map[string][]object{}
	for _, o := range all {
		sorted[o.label] = append(sorted[o.label], o)
	}
	return sorted
}

// only returns the one object of a key.
func only(ref keystore.Ref, all []object) (object, error) {
	switch len(all) {
	case 1:
		return all[0], nil
	case 0:
		return object{}, fmt.Errorf("%v: %w", ref, keystore.ErrNotFound)
	}
	return object{}, fmt.Errorf("%v: %w: %d private objects are labelled %q; "+
		"list them with pkcs11-tool --login --list-objects and delete the objects of other programs",
		ref, keystore.ErrAmbiguous, len(all), labelPrefix+ref.String())
}

// sound refuses an object without the protection or the form of the appliance's keys.
func (o object) sound() error {
	if len(o.id) != len(keystore.Tag{}) {
		return fmt.Errorf("%w: CKA_ID is %x: another program made the object", keystore.ErrUnfit, o.id)
	} else if !o.kept {
		return fmt.Errorf("%w: the private key must be CKA_SENSITIVE and not CKA_EXTRACTABLE", keystore.ErrUnfit)
	}
	return nil
}

// fits compares an object with a description, without a use of the key.
func (o object) fits(info keystore.Info) error {
	fault := o.sound()
	switch {
	case fault != nil:
	case !bytes.Equal(o.id, info.Tag[:]):
		fault = fmt.Errorf("%w: the token has another key under this name now, with CKA_ID %x and not %x",
			keystore.ErrUnfit, o.id, info.Tag[:])
	case o.label != labelPrefix+info.Ref.String():
		fault = fmt.Errorf("%w: the private object is labelled %q", keystore.ErrUnfit, o.label)
	case o.alg != "" && o.alg != info.Algorithm:
		fault = fmt.Errorf("%w: the token has a key for %s under this name now", keystore.ErrUnfit, o.alg)
	}
	if fault != nil {
		return fmt.Errorf("%v: %w", info.Ref, fault)
	}
	return nil
}

// lookup finds the private object of a description by CKA_ID and has the object prove the
// description's public key by one use.
func (st *Store) lookup(s session, info keystore.Info) (found object, err error) {
	before, _ := st.seen.LoadAndDelete(info.Tag)
	if o, ok := before.(seen); ok && o.logins == st.logins.Load() {
		found = o.object
	} else {
		all, err := st.objects(s, attr(pkcs11.CKA_ID, info.Tag[:]))
		if err != nil {
			return found, err
		}
		if found, err = only(info.Ref, all); err != nil {
			return found, err
		}
	}
	if err := found.fits(info); err != nil {
		return found, err
	}
	return found, st.prove(s, info, found.handle)
}

// describe describes a key without a description: its public half is the one public object with its
// CKA_ID that the private object proves.
func (st *Store) describe(s session, ref keystore.Ref) (info keystore.Info, err error) {
	all, err := st.objects(s, labelOf(ref))
	if err != nil {
		return info, err
	}
	private, err := only(ref, all)
	if err == nil {
		err = private.sound()
	}
	if err != nil {
		return info, err
	}
	public, err := st.find(s, attr(pkcs11.CKA_ID, private.id), attr(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
		attr(pkcs11.CKA_TOKEN, true))
	if err != nil {
		return info, err
	}
	info = keystore.Info{
		Ref: ref, Custody: keystore.HSMResident, Tag: keystore.Tag(private.id), Provenance: private.provenance,
	}
	fault := errHalfPair
	for _, o := range public {
		var c curve
		if c, info.PublicKey, err = st.publicKey(s, o); err == nil {
			info.Algorithm = c.alg
			err = st.prove(s, info, private.handle)
		}
		if err == nil || errors.Is(err, keystore.ErrUnavailable) {
			return info, err
		}
		fault = err
	}
	return info, fmt.Errorf("%v: %w: %w", ref, keystore.ErrUnfit, fault)
}

// publicKey reads a public object.
func (st *Store) publicKey(s session, o pkcs11.ObjectHandle) (c curve, key []byte, err error) {
	v, err := st.direct.attributes(s.handle, o, pkcs11.CKA_EC_PARAMS, pkcs11.CKA_EC_POINT)
	if err != nil {
		return c, nil, err
	}
	c, ok := curveOf(v[0])
	if !ok {
		return c, nil, fmt.Errorf("%w: unknown curve: CKA_EC_PARAMS is %x", keystore.ErrUnfit, v[0])
	}
	if key = c.pointOf(v[1]); key == nil {
		return c, nil, fmt.Errorf("%w: CKA_EC_POINT has %d bytes: %s has public keys of %d",
			keystore.ErrUnfit, len(v[1]), c.alg, c.point)
	}
	return c, key, nil
}

func (st *Store) Generate(ctx context.Context, ref keystore.Ref, alg keystore.Algorithm, tag keystore.Tag) (
	keystore.Key, error) {
	return st.create(ctx, "generate", ref, alg, tag, func(s session, c curve) ([]byte, error) {
		return st.generate(s, ref, c, tag)
	})
}

// create runs makeObjects for a key without a private object on the token, and verifies the created
// key. makeObjects returns the public key. operation is generate or import.
func (st *Store) create(ctx context.Context, operation string, ref keystore.Ref, alg keystore.Algorithm,
	tag keystore.Tag, makeObjects func(session, curve) ([]byte, error)) (keystore.Key, error) {
	if err := keystore.CheckName(ref.Name); err != nil {
		return nil, fmt.Errorf("hsm: %s %v: %w", operation, ref, err)
	}
	c, err := st.curveFor(alg)
	if err != nil {
		return nil, err
	}
	info := keystore.Info{Ref: ref, Algorithm: alg, Custody: keystore.HSMResident, Tag: tag}
	err = st.withSession(ctx, fmt.Sprintf("%s %v", operation, ref), func(s session) error {
		same, err := st.objects(s, labelOf(ref))
		if err != nil {
			return err
		}
		if n := len(same); n > 0 {
			return fmt.Errorf("%w: %d private objects are labelled %q",
				keystore.ErrExists, n, labelPrefix+ref.String())
		}
		if err := st.destroy(s, ref, tag); err != nil { // leftovers of a creation that was cut off
			return err
		}
		if info.PublicKey, err = makeObjects(s, c); err == nil {
			_, err = st.verifyCreated(s, &info, operation == "generate")
		}
		if err != nil {
			// Best effort: a remaining object is unusable, since the ledger has no record of the
			// key. Destroy removes the object later.
			return errors.Join(err, st.destroy(s, ref, tag))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return st.Bind(info), nil
}

// verifyCreated reads the attributes of a new key back from the token, sets the key's provenance,
// and proves the key by a use.
func (st *Store) verifyCreated(s session, info *keystore.Info, generated bool) (pkcs11.ObjectHandle, error) {
	found, err := st.lookup(s, *info)
	if errors.Is(err, keystore.ErrNotFound) {
		err = fmt.Errorf("%w: the token does not keep the key that it has made", keystore.ErrUnfit)
	}
	if err != nil {
		return 0, err
	}
	info.Provenance = found.provenance
	if !generated && info.Provenance.Generated() {
		return 0, fmt.Errorf("%w: the token calls an imported key its own", keystore.ErrUnfit)
	}
	info.Provenance.Unreported = generated && !info.Provenance.Generated()
	return found.handle, nil
}

// templates returns the attributes of a new key pair. Every usage flag is set explicitly, since the
// defaults differ between modules and permit too much.
func (st *Store) templates(ref keystore.Ref, c curve, tag keystore.Tag) (
	public, private []*pkcs11.Attribute) {
	signs := c.alg != keystore.X25519
	common := []*pkcs11.Attribute{
		attr(pkcs11.CKA_TOKEN, true),
		attr(pkcs11.CKA_LABEL, labelPrefix+ref.String()),
		attr(pkcs11.CKA_ID, tag[:]),
		attr(pkcs11.CKA_KEY_TYPE, c.kind),
		attr(pkcs11.CKA_MODIFIABLE, false),
	}
	public = append([]*pkcs11.Attribute{
		attr(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
		attr(pkcs11.CKA_EC_PARAMS, st.params(c)),
		attr(pkcs11.CKA_PRIVATE, false),
		attr(pkcs11.CKA_VERIFY, signs),
		attr(pkcs11.CKA_ENCRYPT, false),
		attr(pkcs11.CKA_WRAP, false),
		attr(pkcs11.CKA_DERIVE, false),
	}, common...)
	private = append([]*pkcs11.Attribute{
		attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		attr(pkcs11.CKA_PRIVATE, true),
		attr(pkcs11.CKA_SENSITIVE, true),
		attr(pkcs11.CKA_EXTRACTABLE, false),
		attr(pkcs11.CKA_SIGN, signs),
		attr(pkcs11.CKA_DERIVE, !signs),
		attr(pkcs11.CKA_DECRYPT, false),
		attr(pkcs11.CKA_SIGN_RECOVER, false),
		attr(pkcs11.CKA_UNWRAP, false),
	}, common...)
	if st.quirks.AllowedMechanisms == "on" {
		private = append(private, attr(pkcs11.CKA_ALLOWED_MECHANISMS, attr(0, c.operation).Value))
	}
	return public, private
}

// generate makes a key pair of token objects and returns the public key.
func (st *Store) generate(s session, ref keystore.Ref, c curve, tag keystore.Tag) ([]byte, error) {
	pub, prv := st.templates(ref, c, tag)
	mechanism := []*pkcs11.Mechanism{pkcs11.NewMechanism(c.keygen, nil)}
	public, _, err := st.module.GenerateKeyPair(s.handle, mechanism, pub, prv)
	if err != nil {
		return nil, deviceError("C_GenerateKeyPair", err)
	}
	made, key, err := st.publicKey(s, public)
	if err == nil && made.alg != c.alg {
		err = fmt.Errorf("%w: the token made a key for %s", keystore.ErrUnfit, made.alg)
	}
	return key, err
}

// Import makes a key from the seed in the file at path. Copies of the seed may stay in the memory
// of this process, at least in the module's, so package worker ends the process after an import.
func (st *Store) Import(ctx context.Context, ref keystore.Ref, path string, tag keystore.Tag) (keystore.Key, error) {
	seed, err := keystore.ReadSeed(path)
	if err != nil {
		return nil, fmt.Errorf("hsm: import %v: %w: %w", ref, keystore.ErrRefused, err)
	}
	defer seed.Wipe()
	return st.ImportSeed(ctx, ref, keystore.Ed25519, seed, tag)
}

// ImportSeed is Import with a private key in memory, of any algorithm.
func (st *Store) ImportSeed(
	ctx context.Context, ref keystore.Ref, alg keystore.Algorithm, seed secret.Bytes, tag keystore.Tag,
) (keystore.Key, error) {
	return st.create(ctx, "import", ref, alg, tag, func(s session, c curve) ([]byte, error) {
		return st.importSeed(s, ref, c, tag, seed)
	})
}

// importSeed writes both objects of a key and returns the public key.
func (st *Store) importSeed(s session, ref keystore.Ref, c curve, tag keystore.Tag, seed secret.Bytes) ([]byte, error) {
	public, err := keystore.PublicOf(c.alg, seed)
	if err != nil {
		return nil, err
	}
	point := public
	if st.quirks.ECPoint == "octet-string" || c.alg == keystore.P256 { // PKCS#11 v2.40 section 2.3.3
		point = append([]byte{0x04, byte(len(point))}, point...)
	}
	pub, prv := st.templates(ref, c, tag)
	pub = append(pub, attr(pkcs11.CKA_EC_POINT, point))
	if _, err := st.module.CreateObject(s.handle, pub); err != nil {
		return nil, deviceError("C_CreateObject (public key)", err)
	}
	value := attr(pkcs11.CKA_VALUE, seed.Expose())
	defer clear(value.Value)
	prv = append(prv, attr(pkcs11.CKA_EC_PARAMS, st.params(c)), value)
	if _, err := st.module.CreateObject(s.handle, prv); err != nil {
		return nil, deviceError("C_CreateObject (private key)", err)
	}
	return public, nil
}

// prove has a private object prove the public key of a description, by one use. A key without this
// proof must not come into use. A device may err once; twice means another key.
func (st *Store) prove(s session, info keystore.Info, private pkcs11.ObjectHandle) error {
	err := st.proveOnce(s, info, private)
	if errors.Is(err, keystore.ErrUnfit) {
		err = st.proveOnce(s, info, private)
	}
	return err
}

func (st *Store) proveOnce(s session, info keystore.Info, private pkcs11.ObjectHandle) error {
	if info.Algorithm != keystore.X25519 {
		challenge := []byte("countersign: proof of a new key\x00" + info.Ref.String())
		proof := newSigning(info.Algorithm, challenge)
		proof.handle = &handle{private: private}
		if err := st.direct.sign(s.handle, []*signing{proof}); err != nil {
			return err
		}
		if sig, err := proof.encoded(); err != nil || !info.Verify(challenge, sig) {
			return fmt.Errorf("%v: %w: the private key is not that of the public key, or signs wrongly",
				info.Ref, keystore.ErrUnfit)
		}
		return nil
	}
	peer, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	public, err := ecdh.X25519().NewPublicKey(info.PublicKey)
	if err != nil {
		return err
	}
	want, err := peer.ECDH(public)
	if err != nil {
		return err
	}
	got, err := st.direct.derive(s.handle, private, [32]byte(peer.PublicKey().Bytes()))
	if err != nil {
		return err
	}
	if !bytes.Equal(got[:], want) {
		return fmt.Errorf("%v: %w: the private key is not that of the public key, or exchanges wrongly",
			info.Ref, keystore.ErrUnfit)
	}
	return nil
}

func (st *Store) Destroy(ctx context.Context, ref keystore.Ref, tag keystore.Tag) error {
	return st.withSession(ctx, fmt.Sprintf("destroy %v", ref), func(s session) error { return st.destroy(s, ref, tag) })
}

// destroy removes all objects with the key's label and with the tag as CKA_ID, session objects
// included.
func (st *Store) destroy(s session, ref keystore.Ref, tag keystore.Tag) error {
	st.handles.Delete(tag)
	st.seen.Delete(tag)
	objects, err := st.find(s, labelOf(ref), attr(pkcs11.CKA_ID, tag[:]))
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

// find returns all objects that match a template. find returns an error rather than an empty result
// without a login, because the token hides private objects then.
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
		some, _, err := st.module.FindObjects(s.handle, 1024)
		if err != nil {
			return nil, deviceError("C_FindObjects", err)
		}
		if len(some) == 0 {
			state, err := st.module.GetSessionInfo(s.handle)
			if err != nil || state.State != pkcs11.CKS_RW_USER_FUNCTIONS {
				return nil, fmt.Errorf("%w: the session is not logged in to the token", keystore.ErrUnavailable)
			}
			return found, nil
		}
		found = append(found, some...)
	}
}

func curveOf(params []byte) (curve, bool) {
	for _, c := range curves {
		if bytes.Equal(params, c.oid) || bytes.Equal(params, c.printable()) {
			return c, true
		}
	}
	return curve{}, false
}

// pointOf returns the public key in a CKA_EC_POINT, or nil. Modules write the key raw, as a DER
// OCTET STRING or as a DER BIT STRING. The length tells the forms apart, because the first bytes of
// a raw key can look like DER.
func (c curve) pointOf(b []byte) []byte {
	switch {
	case len(b) == c.point+2 && b[0] == 0x04 && int(b[1]) == c.point:
		b = b[2:]
	case len(b) == c.point+3 && b[0] == 0x03 && int(b[1]) == c.point+1 && b[2] == 0:
		b = b[3:]
	}
	if len(b) != c.point {
		return nil
	}
	return b
}

func isTrue(v []byte) bool { return len(v) == 1 && v[0] != 0 }
