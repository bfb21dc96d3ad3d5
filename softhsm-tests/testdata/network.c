// The network module forwards to SoftHSM. When the module is loaded, the module connects to the
// address of its HSM by name, as the module of a network HSM does, and says on stderr what came of
// it:
//
//   NETWORK_HSM      host:port of the HSM, which answers a line with the same line
//   NETWORK_FOREIGN  host:port of another server
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include "pkcs11.h"

static void reach(const char *what, const char *address) {
	char host[256], line[] = "hello\n", answer[sizeof line] = "";
	const char *colon = strrchr(address, ':');
	snprintf(host, sizeof host, "%.*s", (int)(colon - address), address);
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *all;
	int failed = getaddrinfo(host, colon + 1, &hints, &all);
	if (failed != 0) {
		dprintf(2, "%s: resolve: %s\n", what, gai_strerror(failed));
		return;
	}
	int fd = socket(all->ai_family, all->ai_socktype, all->ai_protocol);
	if (connect(fd, all->ai_addr, all->ai_addrlen) < 0)
		dprintf(2, "%s: connect: %s\n", what, strerrorname_np(errno));
	else if (send(fd, line, sizeof line - 1, 0) < 0 || recv(fd, answer, sizeof line - 1, MSG_WAITALL) < 0 ||
		 strcmp(line, answer) != 0)
		dprintf(2, "%s: no answer: %s\n", what, strerrorname_np(errno));
	else
		dprintf(2, "%s: answered\n", what);
	close(fd);
	freeaddrinfo(all);
}

__attribute__((constructor)) static void load(void) {
	if (getenv("NETWORK_HSM") == NULL) return; // not in a key worker
	reach("the HSM", getenv("NETWORK_HSM"));
	reach("a foreign port", getenv("NETWORK_FOREIGN"));
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST **list) {
	void *module = dlopen("/usr/lib/softhsm/libsofthsm2.so", RTLD_NOW);
	CK_RV (*get)(CK_FUNCTION_LIST **) = module ? dlsym(module, "C_GetFunctionList") : NULL;
	return get ? get(list) : 5; // CKR_GENERAL_ERROR
}
