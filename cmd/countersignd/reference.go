package main

import _ "embed"

//go:generate go test -run TestReference -args -write

// reference is the configuration's documentation as commented TOML. TestReference makes the text of
// the type Config and its comments.
//
//go:embed reference.toml
var reference string
