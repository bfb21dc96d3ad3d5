package main

import (
	"strings"

	"github.com/spf13/cobra"
)

// examples has the example of each command that has none at its definition, without the name of the
// program. TestExamples checks that each command has one, and that each can be typed.
var examples = map[string]string{
	"admin approvals show":      "",
	"admin audit end-epoch":     "",
	"admin backup create":       "",
	"admin backup list":         "",
	"admin backup drill":        "",
	"admin audit key":           ">log.vkey",
	"admin context list":        "",
	"admin context remove":      "old",
	"admin context use":         "prod",
	"admin credential remove":   "ann 4ebc4934b5b0523a48f81cf487635bfb",
	"admin group list":          "",
	"admin group show":          "shops",
	"admin key authorize-noise": "",
	"admin key list":            "",
	"admin key show":            "payments",
	"admin ledger accept-time":  "",
	"admin ledger compact":      "",
	"admin ledger stats":        "",
	"admin logout":              "",
	"admin noise-key":           "",
	"admin operator list":       "",
	"admin operator remove":     "bob",
	"admin operator show":       "ann",
	"admin peer activity":       "",
	"admin peer list":           "",
	"admin peer refused":        "",
	"admin peer remove":         "shop",
	"admin peer resume":         "shop",
	"admin peer show":           "shop",
	"admin peer suspend":        "shop",
	"admin policy list":         "",
	"admin policy reload":       "",
	"admin proposal approve":    "7",
	"admin scraper list":        "",
	"admin scraper remove":      "prometheus",
	"admin proposal list":       "",
	"admin proposal show":       "7",
	"admin proposal withdraw":   "7",
	"admin receipt show":        "1f0c7b5e0b6d4c1c8a3e2d9f7b6a5c4d",
	"admin retention preview":   "",
	"admin rollback accept":     `--reason "the disk was replaced by its mirror"`,
	"admin rollback show":       "",
	"admin sessions list":       "",
	"admin sessions revoke":     "b461a9020553034f5d01a363b8b35be4",
	"admin tls show":            "",
	"admin tls uninstall":       "",
	"admin token list":          "",
	"admin token retry":         "main",
	"admin token show":          "main",
	"admin unlock":              "",
	"admin whoami":              "",
	"admin machine show":        "",
	"admin machine restart":     "",
	"keys":                      "--server 10.0.0.5:7700 --server-key \"$(cat noise.pub)\" --identity shop.key",
	"ping":                      "--server 10.0.0.5:7700 --server-key \"$(cat noise.pub)\" --identity shop.key",
	"policy schema":             "",
	"transcript list":           "",
}

// addExamples adds the examples to the commands below root.
func addExamples(root *cobra.Command) {
	for path, arguments := range examples {
		c, rest, err := root.Find(strings.Fields(path))
		if err != nil || len(rest) > 0 || c.Example != "" {
			continue // TestExamples finds an example of no command
		}
		c.Example = "  " + c.CommandPath()
		if arguments != "" {
			c.Example += " " + arguments
		}
	}
}
