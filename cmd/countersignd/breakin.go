//go:build breakin

package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"countersign/internal/launcher"
)

// breakIn opens the Unix socket BREAKIN_SOCKET, before the daemon is confined. Whoever connects has
// the daemon make system calls, as code would that has taken the daemon over. A line has an act of
// prove.go, or "start", and its target, separated by tabs. This file is part of a build for tests
// only.
func breakIn(c Config) {
	l, err := net.Listen("unix", os.Getenv("BREAKIN_SOCKET"))
	if err != nil {
		panic(err)
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			lines := bufio.NewScanner(conn)
			for lines.Scan() {
				fmt.Fprintln(conn, broken(c, strings.Split(lines.Text(), "\t")))
			}
			conn.Close()
		}
	}()
}

func broken(c Config, fields []string) string {
	if fields[0] == "start" { // a key worker, by the launcher
		read, write, err := os.Pipe()
		if err != nil {
			return err.Error()
		}
		defer read.Close()
		defer write.Close()
		what := launcher.Start{Token: fields[1], Seed: fields[2], Make: fields[3] != ""}
		_, err = c.launcher.Start(what, write, write)
		return fmt.Sprint(err)
	}
	var t target
	t.folder, t.socket = fields[1], fields[2]
	t.port, _ = strconv.Atoi(fields[3])
	t.pid, _ = strconv.Atoi(fields[4])
	return try(fields[0], t)
}
