// The hostile module forwards to SoftHSM. When the module is loaded, the module tries what the
// variables say, from inside the key worker:
//
//   HOSTILE_REPORT  a folder: the file "report" in it gets a line for each act, its name and errno
//   HOSTILE_FOLDER  as a text file:PATH, the folder with the appliance's files
//   HOSTILE_FATAL   the name of an act that should end the process
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#include "pkcs11.h"

static int report;

static void result(const char *act, long rv) {
	dprintf(report, "%s %d\n", act, rv < 0 ? errno : 0);
}

// reach opens the file name in a folder, with the flags of open(2).
static void reach(const char *act, const char *folder, const char *name, int flags) {
	char path[4096];
	snprintf(path, sizeof path, "%s/%s", folder, name);
	int fd = open(path, flags | O_CLOEXEC, 0600);
	result(act, fd);
	if (fd >= 0) close(fd);
}

static void try_all(const char *folder) {
	char parent[64];
	snprintf(parent, sizeof parent, "/proc/%d", getppid());
	reach("read-own-pin", folder, "pin", O_RDONLY);
	reach("read-ledger", folder, "ledger.db", O_RDONLY);
	reach("write-ledger", folder, "ledger.db", O_WRONLY);
	reach("read-other-pin", folder, "so-pin", O_RDONLY);
	reach("read-config", folder, "countersign.toml", O_RDONLY);
	reach("write-softhsm-config", folder, "softhsm2.conf", O_WRONLY);
	reach("make-file", folder, "planted", O_WRONLY | O_CREAT);
	reach("read-shadow", "/etc", "shadow", O_RDONLY);
	reach("read-daemon-memory", parent, "mem", O_RDWR);
	reach("read-daemon-environment", parent, "environ", O_RDONLY);
	int fd = open("/usr/bin/true", O_RDONLY | O_CLOEXEC);
	result("read-program", fd);
	if (fd >= 0) close(fd);
	char *none[] = {NULL};
	result("execute", execve("/usr/bin/true", none, none));
	pid_t child = fork();
	if (child == 0) _exit(0);
	result("fork", child);
	result("signal-daemon", kill(getppid(), 0));
	result("socket-tcp", socket(AF_INET, SOCK_STREAM, 0));
	result("socket-udp", socket(AF_INET, SOCK_DGRAM, 0));
	result("socket-unix", socket(AF_UNIX, SOCK_STREAM, 0));
}

static void try_fatal(const char *act) {
	char byte;
	struct iovec here = {&byte, 1}, there = {(void *)try_fatal, 1};
	if (strcmp(act, "ptrace") == 0) ptrace(PTRACE_SEIZE, getppid(), 0, 0);
	if (strcmp(act, "process_vm_readv") == 0) process_vm_readv(getppid(), &here, 1, &there, 1, 0);
	if (strcmp(act, "mount") == 0) mount("none", "/proc", "tmpfs", 0, NULL);
	if (strcmp(act, "user-namespace") == 0) unshare(CLONE_NEWUSER);
	if (strcmp(act, "module") == 0) syscall(SYS_finit_module, -1, "", 0);
#ifdef __x86_64__
	if (strcmp(act, "32-bit") == 0) { // getpid by the numbers of i386
		long rv = 20;
		__asm__ volatile("int $0x80" : "+a"(rv) : : "memory", "r8", "r9", "r10", "r11");
	}
#endif
}

__attribute__((constructor)) static void load(void) {
	const char *folder = getenv("HOSTILE_FOLDER"), *fatal = getenv("HOSTILE_FATAL");
	char path[4096];
	snprintf(path, sizeof path, "%s/report", getenv("HOSTILE_REPORT"));
	report = open(path, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
	if (report < 0) _exit(71);
	if (folder != NULL) try_all(strchr(folder, ':') + 1);
	if (fatal != NULL) {
		try_fatal(fatal);
		result("survived", 0);
	}
	close(report);
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST **list) {
	void *module = dlopen("/usr/lib/softhsm/libsofthsm2.so", RTLD_NOW);
	CK_RV (*get)(CK_FUNCTION_LIST **) = module ? dlsym(module, "C_GetFunctionList") : NULL;
	return get ? get(list) : 5; // CKR_GENERAL_ERROR
}
