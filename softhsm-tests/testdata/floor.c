// floor measures the signatures per second of a loop over C_SignInit and C_Sign. The rate is the
// floor in the ratios of the benchmarks.
//
//   usage: floor MODULE PIN-FILE KEY-LABEL
//
// For each line "SESSIONS MILLISECONDS" of stdin, floor signs in SESSIONS threads with a PKCS#11
// session each, for MILLISECONDS, and prints the signatures per second.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "pkcs11.h"

static CK_FUNCTION_LIST *f;
static CK_ULONG key;
static volatile int stop;

struct loop { pthread_t thread; CK_ULONG session; long done; };

static void must(CK_RV rv, const char *what) {
	if (rv != CKR_OK) {
		fprintf(stderr, "floor: %s: 0x%lx\n", what, rv);
		exit(1);
	}
}

static void *run(void *argument) {
	struct loop *l = argument;
	unsigned char message[115] = { 0 }, signature[64];
	CK_MECHANISM eddsa = { CKM_EDDSA, NULL, 0 };
	while (!stop) {
		CK_ULONG size = sizeof signature;
		must(f->function[SIGN_INIT](l->session, &eddsa, key), "C_SignInit");
		must(f->function[SIGN](l->session, message, (CK_ULONG)sizeof message, signature, &size), "C_Sign");
		l->done++;
	}
	return NULL;
}

int main(int argc, char **argv) {
	if (argc != 4) return 2;
	void *module = dlopen(argv[1], RTLD_NOW);
	CK_RV (*get)(CK_FUNCTION_LIST **) = module ? dlsym(module, "C_GetFunctionList") : NULL;
	if (get == NULL) return 2;
	must(get(&f), "C_GetFunctionList");
	CK_INITIALIZE threads = { .flags = 2 };
	must(f->function[INITIALIZE](&threads), "C_Initialize");
	CK_ULONG slots[16], n = 16, session;
	must(f->function[GET_SLOT_LIST](1, slots, &n), "C_GetSlotList");
	char pin[256] = "";
	FILE *file = fopen(argv[2], "r");
	if (file == NULL || fgets(pin, sizeof pin, file) == NULL) return 2;
	pin[strcspn(pin, "\n")] = 0;
	must(f->function[OPEN_SESSION](slots[0], (CK_ULONG)CKF_RW_SERIAL, NULL, NULL, &session), "C_OpenSession");
	must(f->function[LOGIN](session, (CK_ULONG)1, pin, (CK_ULONG)strlen(pin)), "C_Login");
	CK_ULONG class = CKO_PRIVATE_KEY, found = 0;
	CK_ATTRIBUTE template[] = { { CKA_CLASS, &class, sizeof class }, { CKA_LABEL, argv[3], strlen(argv[3]) } };
	must(f->function[FIND_OBJECTS_INIT](session, template, (CK_ULONG)2), "C_FindObjectsInit");
	must(f->function[FIND_OBJECTS](session, &key, (CK_ULONG)1, &found), "C_FindObjects");
	must(f->function[FIND_OBJECTS_FINAL](session), "C_FindObjectsFinal");
	if (found != 1) return 2;
	static struct loop loops[64];
	int sessions, ms, opened = 0;
	while (scanf("%d %d", &sessions, &ms) == 2 && sessions <= 64) {
		for (; opened < sessions; opened++)
			must(f->function[OPEN_SESSION](slots[0], (CK_ULONG)CKF_RW_SERIAL, NULL, NULL, &loops[opened].session),
				"C_OpenSession");
		struct timespec from, to, wait = { ms / 1000, ms % 1000 * 1000000L };
		stop = 0;
		clock_gettime(CLOCK_MONOTONIC, &from);
		for (int i = 0; i < sessions; i++) {
			loops[i].done = 0;
			pthread_create(&loops[i].thread, NULL, run, &loops[i]);
		}
		nanosleep(&wait, NULL);
		stop = 1;
		long done = 0;
		for (int i = 0; i < sessions; i++) {
			pthread_join(loops[i].thread, NULL);
			done += loops[i].done;
		}
		clock_gettime(CLOCK_MONOTONIC, &to);
		printf("%.0f\n", done / (to.tv_sec - from.tv_sec + (to.tv_nsec - from.tv_nsec) / 1e9));
		fflush(stdout);
	}
	return 0;
}
