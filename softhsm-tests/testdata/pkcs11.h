// The part of the PKCS#11 v2.40 C binding that the test programs here need (OASIS, PKCS #11 Cryptographic Token
// Interface Base Specification, sections 3 to 5): the types as they are laid out on Linux.
#include <stddef.h>

typedef unsigned long CK_ULONG, CK_RV;
typedef struct { CK_ULONG mechanism; void *parameter; CK_ULONG length; } CK_MECHANISM;
typedef struct { CK_ULONG type; void *value; CK_ULONG length; } CK_ATTRIBUTE;
typedef struct { void *create, *destroy, *lock, *unlock; CK_ULONG flags; void *reserved; } CK_INITIALIZE;
typedef CK_RV (*CK_FUNCTION)(); // called with the arguments of the function that it is
typedef struct { unsigned char version[2]; CK_FUNCTION function[68]; } CK_FUNCTION_LIST;

// Where the functions stand in CK_FUNCTION_LIST.
enum {
	INITIALIZE = 0, FINALIZE = 1, GET_SLOT_LIST = 4, GET_TOKEN_INFO = 6, OPEN_SESSION = 12, CLOSE_SESSION = 13,
	CLOSE_ALL_SESSIONS = 14, GET_SESSION_INFO = 15, LOGIN = 18, LOGOUT = 19, COPY_OBJECT = 21, DESTROY_OBJECT = 22,
	GET_ATTRIBUTE_VALUE = 24, FIND_OBJECTS_INIT = 26, FIND_OBJECTS = 27, FIND_OBJECTS_FINAL = 28, SIGN_INIT = 42,
	SIGN = 43, GENERATE_KEY_PAIR = 59, DERIVE_KEY = 62, FUNCTIONS = 68
};

enum { CKA_CLASS = 0, CKA_LABEL = 3, CKA_VALUE = 0x11, CKO_PRIVATE_KEY = 3, CKM_EDDSA = 0x1057, CKF_RW_SERIAL = 6 };
enum {
	CKR_OK = 0, CKR_DEVICE_ERROR = 0x30, CKR_DEVICE_REMOVED = 0x32, CKR_KEY_HANDLE_INVALID = 0x60, CKR_SESSION_COUNT = 0xb1
};
