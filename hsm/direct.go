package hsm

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

// The part of PKCS#11 used below, with the types of the C binding (PKCS#11 v2.40 section 2, 3.2).
typedef unsigned long ulong_t;
typedef struct { ulong_t mechanism; void *parameter; ulong_t length; } mechanism_t;
typedef struct { ulong_t type; void *value; ulong_t length; } attribute_t;
typedef struct { ulong_t kdf, shared_length; void *shared; ulong_t length; void *public; } ecdh1_t;
typedef struct { unsigned char version[2]; void *function[70]; } functions_t;

// Indices of the functions in CK_FUNCTION_LIST.
enum { DESTROY_OBJECT = 22, GET_ATTRIBUTE_VALUE = 24, SIGN_INIT = 42, SIGN = 43, DERIVE_KEY = 62 };

typedef ulong_t (*destroy_object_t)(ulong_t, ulong_t);
typedef ulong_t (*get_attribute_value_t)(ulong_t, ulong_t, attribute_t *, ulong_t);
typedef ulong_t (*sign_init_t)(ulong_t, mechanism_t *, ulong_t);
typedef ulong_t (*sign_t)(ulong_t, unsigned char *, ulong_t, unsigned char *, ulong_t *);
typedef ulong_t (*derive_key_t)(ulong_t, mechanism_t *, ulong_t, attribute_t *, ulong_t, ulong_t *);

static void *load(const char *path, functions_t **list) {
	void *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (module == NULL) return NULL;
	ulong_t (*get)(functions_t **) = dlsym(module, "C_GetFunctionList");
	if (get == NULL || get(list) != 0 || *list == NULL) {
		dlclose(module);
		return NULL;
	}
	return module;
}

// item is one signature of a batch. Its input begins at offset in the batch's data.
typedef struct { ulong_t mechanism, key, offset, length; } item_t;

// sign makes count signatures of 64 bytes each, one after another, and returns the number made. If
// one fails, rv and size have the cause, and failed the name of the call.
static ulong_t sign(functions_t *f, ulong_t session, item_t *items, ulong_t count,
		unsigned char *data, unsigned char *signatures,
		ulong_t *rv, ulong_t *size, const char **failed) {
	for (ulong_t i = 0; i < count; i++) {
		mechanism_t m = { items[i].mechanism, NULL, 0 };
		*failed = "C_SignInit";
		*rv = ((sign_init_t)f->function[SIGN_INIT])(session, &m, items[i].key);
		if (*rv != 0) return i;
		unsigned char signature[256]; // larger than 64, to notice a signature of a wrong length
		*size = sizeof signature;
		*failed = "C_Sign";
		unsigned char *input = data + items[i].offset;
		*rv = ((sign_t)f->function[SIGN])(session, input, items[i].length, signature, size);
		if (*rv != 0 || *size != 64) return i;
		memcpy(signatures + 64 * i, signature, 64);
	}
	return count;
}

// derive makes the shared secret of 32 bytes as a session object, reads its value and destroys the
// object.
static ulong_t derive(functions_t *f, ulong_t session, ulong_t key, void *peer,
		unsigned char *secret, ulong_t *size, const char **failed) {
	ecdh1_t parameter = { 1, 0, NULL, 32, peer }; // CKD_NULL
	mechanism_t m = { 0x1050, &parameter, sizeof parameter }; // CKM_ECDH1_DERIVE
	ulong_t class = 4, type = 0x10, want = 32; // CKO_SECRET_KEY, CKK_GENERIC_SECRET
	unsigned char yes = 1, no = 0;
	attribute_t template[] = {
		{ 0x000, &class, sizeof class }, // CKA_CLASS
		{ 0x100, &type, sizeof type },   // CKA_KEY_TYPE
		{ 0x161, &want, sizeof want },   // CKA_VALUE_LEN
		{ 0x001, &no, 1 },               // CKA_TOKEN
		{ 0x103, &no, 1 },               // CKA_SENSITIVE
		{ 0x162, &yes, 1 },              // CKA_EXTRACTABLE
	};
	ulong_t count = sizeof template / sizeof *template, object = 0;
	*failed = "C_DeriveKey";
	derive_key_t derive_key = (derive_key_t)f->function[DERIVE_KEY];
	ulong_t rv = derive_key(session, &m, key, template, count, &object);
	if (rv != 0) return rv;
	attribute_t value = { 0x011, secret, *size };
	*failed = "C_GetAttributeValue";
	rv = ((get_attribute_value_t)f->function[GET_ATTRIBUTE_VALUE])(session, object, &value, 1);
	*size = value.length;
	ulong_t destroyed = ((destroy_object_t)f->function[DESTROY_OBJECT])(session, object);
	if (rv == 0 && destroyed != 0) {
		*failed = "C_DestroyObject";
		rv = destroyed;
	}
	return rv;
}
*/
import "C"

import (
	"fmt"
	"sync"
	"unsafe"

	"countersign/internal/keystore"

	"github.com/miekg/pkcs11"
)

// direct makes the hot calls of the module: signatures and derivations. A batch of signatures or a
// derivation is one call from Go to C, with one request to the device for each step. miekg/pkcs11
// makes all other calls. miekg/pkcs11 calls C_Sign and C_GetAttributeValue twice, first for the
// length; with a device behind a network the extra request is a third of the time.
type direct struct {
	module    unsafe.Pointer
	functions *C.functions_t
}

// loadDirect opens a module already opened by miekg/pkcs11. dlopen returns the same library to
// both.
func loadDirect(path string) (*direct, error) {
	p := C.CString(path)
	defer C.free(unsafe.Pointer(p))
	d := new(direct)
	if d.module = C.load(p, &d.functions); d.module == nil {
		return nil, fmt.Errorf("%s has no C_GetFunctionList", path)
	}
	return d, nil
}

func (d *direct) close() { C.dlclose(d.module) }

// batch is the memory of one call from Go to C, without pointers to Go memory.
type batch struct {
	items      [maxBatch]C.item_t
	signatures [maxBatch * signatureSize]byte
	data       []byte
}

// batches recycles memory. A batch's data is never nil: modules refuse a null pointer even with
// length 0.
var batches = sync.Pool{New: func() any { return &batch{data: make([]byte, 0, 4096)} }}

// sign makes signatures for at most maxBatch inputs, and stops at the first failure. A signature
// has 64 bytes with Ed25519 and with raw ECDSA on P-256.
func (d *direct) sign(session pkcs11.SessionHandle, inputs []*signing) error {
	b := batches.Get().(*batch)
	defer batches.Put(b)
	b.data = b.data[:0]
	for i, in := range inputs {
		b.items[i] = C.item_t{
			C.ulong_t(in.mechanism), C.ulong_t(in.handle.private), C.ulong_t(len(b.data)), C.ulong_t(len(in.input)),
		}
		b.data = append(b.data, in.input...)
	}
	var rv, size C.ulong_t
	var failed *C.char
	done := C.sign(d.functions, C.ulong_t(session), &b.items[0], C.ulong_t(len(inputs)),
		(*C.uchar)(unsafe.SliceData(b.data)), (*C.uchar)(&b.signatures[0]), &rv, &size, &failed)
	switch {
	case rv != 0:
		return deviceError(C.GoString(failed), pkcs11.Error(rv))
	case int(done) != len(inputs):
		return fmt.Errorf("%w: C_Sign: a signature of %d bytes", keystore.ErrUnavailable, size)
	}
	for i, in := range inputs {
		in.signature = [signatureSize]byte(b.signatures[i*signatureSize:])
	}
	return nil
}

// derive makes the X25519 shared secret of 32 bytes.
func (d *direct) derive(session pkcs11.SessionHandle, key pkcs11.ObjectHandle, peer [32]byte) (
	shared [32]byte, err error) {
	size := C.ulong_t(len(shared))
	var failed *C.char
	rv := C.derive(d.functions, C.ulong_t(session), C.ulong_t(key), unsafe.Pointer(&peer[0]),
		(*C.uchar)(&shared[0]), &size, &failed)
	if rv != 0 {
		return [32]byte{}, deviceError(C.GoString(failed), pkcs11.Error(rv))
	}
	if size != 32 {
		return [32]byte{}, fmt.Errorf("%w: C_DeriveKey: a secret of %d bytes", keystore.ErrUnavailable, size)
	}
	return shared, nil
}
