package hsm

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The part of PKCS#11 used below, with the types of the C binding (PKCS#11 v2.40 section 2, 3.2).
typedef unsigned long ulong_t;
typedef struct { ulong_t mechanism; void *parameter; ulong_t length; } mechanism_t;
typedef struct { ulong_t type; void *value; ulong_t length; } attribute_t;
typedef struct { ulong_t kdf, shared_length; void *shared; ulong_t length; void *public; } ecdh1_t;
typedef struct { unsigned char version[2]; void *function[70]; } functions_t;

// Indices of the functions in CK_FUNCTION_LIST.
enum { INITIALIZE = 0, DESTROY_OBJECT = 22, GET_ATTRIBUTE_VALUE = 24 };
enum { SIGN_INIT = 42, SIGN = 43, DERIVE_KEY = 62 };

typedef ulong_t (*initialize_t)(void *);
typedef ulong_t (*destroy_object_t)(ulong_t, ulong_t);
typedef ulong_t (*get_attribute_value_t)(ulong_t, ulong_t, attribute_t *, ulong_t);
typedef ulong_t (*sign_init_t)(ulong_t, mechanism_t *, ulong_t);
typedef ulong_t (*sign_t)(ulong_t, unsigned char *, ulong_t, unsigned char *, ulong_t *);
typedef ulong_t (*derive_key_t)(ulong_t, mechanism_t *, ulong_t, attribute_t *, ulong_t, ulong_t *);

// load loads a library with C_GetFunctionList. If load fails, why has the dynamic linker's reason.
static void *load(const char *path, char *why, size_t size) {
	void *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (module != NULL && dlsym(module, "C_GetFunctionList") != NULL) return module;
	const char *text = dlerror();
	snprintf(why, size, "%s", text != NULL ? text : "C_GetFunctionList is a null pointer");
	if (module != NULL) dlclose(module);
	return NULL;
}

// initialize calls C_Initialize. NSS reads the parameters in the place of pReserved, and has one
// field more after that, a null pointer here.
static ulong_t initialize(functions_t *f, const char *parameters) {
	struct { void *mutex[4]; ulong_t flags; const char *parameters; void *after; } arguments = {
		.flags = 2, .parameters = parameters, // CKF_OS_LOCKING_OK
	};
	return ((initialize_t)f->function[INITIALIZE])(&arguments);
}

// ROOM is the room for one attribute's value, in bytes. All values of the appliance's keys fit.
enum { ROOM = 128 };

// attributes reads at most 16 attributes of an object in one call. The length of an attribute that
// is absent, secret or larger than ROOM is above ROOM.
static ulong_t attributes(functions_t *f, ulong_t session, ulong_t object,
		ulong_t *types, ulong_t count, unsigned char *values, ulong_t *lengths) {
	attribute_t template[16];
	for (ulong_t i = 0; i < count; i++)
		template[i] = (attribute_t){ types[i], values + ROOM * i, ROOM };
	get_attribute_value_t get = (get_attribute_value_t)f->function[GET_ATTRIBUTE_VALUE];
	ulong_t rv = get(session, object, template, count);
	for (ulong_t i = 0; i < count; i++) lengths[i] = template[i].length;
	// CKR_ATTRIBUTE_SENSITIVE, CKR_ATTRIBUTE_TYPE_INVALID and CKR_BUFFER_TOO_SMALL are about single
	// attributes; the others have their values (PKCS#11 v2.40 section 5.7, C_GetAttributeValue).
	return rv == 0x11 || rv == 0x12 || rv == 0x150 ? 0 : rv;
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
		unsigned char signature[256]; // larger than a signature, should a module not keep to size
		*size = 64;                   // NSS takes no other size
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

// direct makes calls of the module that miekg/pkcs11 makes otherwise: signatures, derivations,
// C_Initialize with parameters, and the reading of attributes. miekg/pkcs11 makes all other calls.
// A batch of signatures or a derivation is one call from Go to C, with one request to the device
// for each step. miekg/pkcs11 calls C_Sign and C_GetAttributeValue twice, first for the length;
// with a device behind a network the extra request is a third of the time.
type direct struct {
	library   unsafe.Pointer
	functions *C.functions_t // the list of the pkcs11.Ctx
}

// loadModule loads a module. direct and miekg/pkcs11 use the same function list: p11-kit gives each
// caller of C_GetFunctionList an instance of its own, with sessions and objects of its own.
func loadModule(path string) (*pkcs11.Ctx, *direct, error) {
	p := C.CString(path)
	defer C.free(unsafe.Pointer(p))
	var why [512]C.char
	library := C.load(p, &why[0], C.size_t(len(why)))
	if library == nil {
		return nil, nil, fmt.Errorf("%s can't be loaded as a PKCS#11 module: %s", path, C.GoString(&why[0]))
	}
	module := pkcs11.New(path) // the same library again
	if module != nil {
		if functions := functionList(module); functions != nil {
			return module, &direct{library, functions}, nil
		}
		module.Destroy()
	}
	C.dlclose(library)
	return nil, nil, fmt.Errorf("%s can't be loaded as a PKCS#11 module: C_GetFunctionList gives no list", path)
}

// functionList returns the function list of a pkcs11.Ctx, which has no method for that: the second
// word of the C structure that the only field of a Ctx points to.
func functionList(module *pkcs11.Ctx) *C.functions_t {
	type ctx struct {
		handle unsafe.Pointer
		sym    *C.functions_t
	}
	return (*(**ctx)(unsafe.Pointer(module))).sym
}

func (d *direct) close() { C.dlclose(d.library) }

// initialize calls C_Initialize. An empty string is a null pointer.
func (d *direct) initialize(parameters string) error {
	var p *C.char
	if parameters != "" {
		p = C.CString(parameters)
		defer C.free(unsafe.Pointer(p))
	}
	if rv := C.initialize(d.functions, p); rv != 0 {
		return deviceError("C_Initialize", pkcs11.Error(rv))
	}
	return nil
}

// maxAttributes is the limit of attributes read in one call.
const maxAttributes = 16

// attributes returns the values of an object's attributes, in the order of types. The value of an
// attribute that is absent, secret, or longer than 128 bytes is nil.
func (d *direct) attributes(s pkcs11.SessionHandle, o pkcs11.ObjectHandle, types ...uint) ([][]byte, error) {
	var ids, lengths [maxAttributes]C.ulong_t
	var room [maxAttributes * C.ROOM]byte
	for i, t := range types {
		ids[i] = C.ulong_t(t)
	}
	rv := C.attributes(d.functions, C.ulong_t(s), C.ulong_t(o), &ids[0], C.ulong_t(len(types)),
		(*C.uchar)(&room[0]), &lengths[0])
	if rv != 0 {
		return nil, deviceError("C_GetAttributeValue", pkcs11.Error(rv))
	}
	values := make([][]byte, len(types))
	for i := range values {
		if lengths[i] <= C.ROOM {
			values[i] = room[i*C.ROOM:][:lengths[i]:lengths[i]]
		}
	}
	return values, nil
}

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
