// Package ownfile makes files that no other user can open, and refuses a file that another user can
// open or change. Root, on Windows SYSTEM and Administrators, can open and change every file.
//
// On Linux and macOS, mode and owner decide. The mode of a file with a POSIX access list shows the
// most that the list allows. An access list of macOS (chmod +a) does not show in the mode, and is
// not read.
//
// On Windows a mode means nothing. Owner and access list decide: the list may give access to the
// user, SYSTEM and Administrators, and to no other account. Accounts with the privilege to make
// backups, and access to the disk itself, are not looked for. A file system without access lists,
// such as FAT, gives access to every account, so its files are refused.
package ownfile
