// A part of the PKCS#11 v2.40 C binding (OASIS, PKCS #11 Cryptographic Token Interface Base
// Specification, sections 3 to 5), with the layout of the types on Linux. The test programs in this
// folder need no more.
#include <stddef.h>

typedef unsigned long CK_ULONG, CK_RV;
typedef struct { CK_ULONG mechanism; void *parameter; CK_ULONG length; } CK_MECHANISM;
typedef struct { CK_ULONG type; void *value; CK_ULONG length; } CK_ATTRIBUTE;
typedef struct { void *create, *destroy, *lock, *unlock; CK_ULONG flags; void *reserved; } CK_INITIALIZE;
typedef struct { unsigned char cryptoki[2], maker[32]; CK_ULONG flags; unsigned char library[32], version[2]; } CK_INFO;
typedef struct {
	unsigned char label[32], maker[32], model[16], serial[16];
	CK_ULONG flags, most, used, most_rw, used_rw, max_pin, min_pin, memory[4]; // most: ulMaxSessionCount
	unsigned char hardware[2], firmware[2], time[16];
} CK_TOKEN_INFO;
typedef CK_RV (*CK_FUNCTION)(); // any PKCS#11 function, called with the function's own arguments
typedef struct { unsigned char version[2]; CK_FUNCTION function[68]; } CK_FUNCTION_LIST;

// Indexes of the functions in CK_FUNCTION_LIST.
enum {
	INITIALIZE = 0, FINALIZE = 1, GET_INFO = 2, GET_SLOT_LIST = 4, GET_TOKEN_INFO = 6, GET_MECHANISM_LIST = 7,
	OPEN_SESSION = 12, CLOSE_SESSION = 13, CLOSE_ALL_SESSIONS = 14, GET_SESSION_INFO = 15, LOGIN = 18, LOGOUT = 19,
	CREATE_OBJECT = 20, COPY_OBJECT = 21, DESTROY_OBJECT = 22, GET_ATTRIBUTE_VALUE = 24, FIND_OBJECTS_INIT = 26,
	FIND_OBJECTS = 27, FIND_OBJECTS_FINAL = 28, SIGN_INIT = 42, SIGN = 43, GENERATE_KEY_PAIR = 59, DERIVE_KEY = 62,
	FUNCTIONS = 68
};

enum { CKA_CLASS = 0, CKA_LABEL = 3, CKA_VALUE = 0x11, CKO_PRIVATE_KEY = 3, CKM_EDDSA = 0x1057, CKF_RW_SERIAL = 6 };
enum { CKA_LOCAL = 0x163, CKA_KEY_TYPE = 0x100, CKA_EC_PARAMS = 0x180, CKA_EC_POINT = 0x181, CKA_ALLOWED_MECHANISMS = 0x40000600 };
enum {
	CKK_EC_EDWARDS = 0x40, CKK_EC_MONTGOMERY = 0x41,
	CKM_EC_EDWARDS_KEY_PAIR_GEN = 0x1055, CKM_EC_MONTGOMERY_KEY_PAIR_GEN = 0x1056
};
enum {
	CKR_OK = 0, CKR_ATTRIBUTE_TYPE_INVALID = 0x12, CKR_ATTRIBUTE_VALUE_INVALID = 0x13, CKR_DEVICE_ERROR = 0x30,
	CKR_DEVICE_REMOVED = 0x32, CKR_KEY_HANDLE_INVALID = 0x60, CKR_MECHANISM_INVALID = 0x70, CKR_SESSION_COUNT = 0xb1,
	CKR_TEMPLATE_INCONSISTENT = 0xd1, CKR_CURVE_NOT_SUPPORTED = 0x140, CKR_BUFFER_TOO_SMALL = 0x150
};
