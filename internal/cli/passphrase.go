package cli

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/term"
)

// Passphrase returns a function that asks for the passphrase of a file at the terminal.
func Passphrase(ctx context.Context, file string) func() ([]byte, error) {
	return func() ([]byte, error) {
		stdin := int(os.Stdin.Fd())
		state, err := term.GetState(stdin)
		if err != nil {
			return nil, errors.New("it has a passphrase, which is asked for at a terminal only")
		}
		fmt.Fprintf(os.Stderr, "Passphrase of %s: ", file)
		defer fmt.Fprintln(os.Stderr)
		read := make(chan []byte, 1)
		go func() {
			b, _ := term.ReadPassword(stdin)
			read <- b
		}()
		select {
		case b := <-read:
			return b, nil
		case <-ctx.Done():
			term.Restore(stdin, state)
			return nil, ctx.Err()
		}
	}
}
