// Command receiver is the receiver of webhooks in the demo. The command verifies each message with
// the key of the audit log, and prints a line.
package main

import (
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"countersign/internal/webhook"
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// run serves on an address until the process ends.
func run(args []string, stdout, stderr io.Writer) int {
	if len(args) != 2 {
		fmt.Fprintln(stderr, "usage: receiver HOST:PORT whpk_KEY")
		return 2
	}
	key, err := webhook.ParseKey(args[1])
	if err == nil {
		server := &http.Server{Addr: args[0], Handler: receiver(key, stdout), ReadTimeout: 10 * time.Second}
		err = server.ListenAndServe()
	}
	fmt.Fprintf(stderr, "receiver: error: %v\n", err)
	return 1
}

// receiver prints the messages that are signed by a key.
func receiver(key ed25519.PublicKey, stdout io.Writer) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
		if err == nil {
			err = webhook.Verify(key, r.Header, body, time.Now(), webhook.Tolerance)
		}
		var m struct {
			Type      string    `json:"type"`
			Timestamp time.Time `json:"timestamp"`
			Data      struct {
				Code  string `json:"code"`
				Level string `json:"level"`
				Text  string `json:"text"`
				See   string `json:"see"`
			} `json:"data"`
		}
		if err == nil {
			err = json.Unmarshal(body, &m)
		}
		if err != nil {
			fmt.Fprintf(stdout, "refused: %v\n", err)
			http.Error(w, "the message is not taken", http.StatusBadRequest)
			return
		}
		fmt.Fprintf(stdout, "%s %s %s, %s: %s, see %s\n", m.Timestamp.Format(time.RFC3339), m.Type, m.Data.Code,
			m.Data.Level, m.Data.Text, m.Data.See)
		w.WriteHeader(http.StatusNoContent)
	})
}
