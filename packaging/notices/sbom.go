package main

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// tool lists the modules of a binary. Its detection of licences stays off: the tool finds none for
// some modules of a binary whose main module has no dot in its path, and a wrong one for
// golang.org/x.
const tool = "github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@v1.10.0"

type object = map[string]any

type document struct {
	Schema   string `json:"$schema"`
	Format   string `json:"bomFormat"`
	Spec     string `json:"specVersion"`
	Version  int    `json:"version"`
	Metadata struct {
		Tools      []object                       `json:"tools"`
		Component  object                         `json:"component"`
		Properties []struct{ Name, Value string } `json:"properties,omitempty"`
	} `json:"metadata"`
	Components   []object     `json:"components"`
	Dependencies []dependency `json:"dependencies"`
}

type dependency struct {
	Ref string   `json:"ref"`
	On  []string `json:"dependsOn,omitempty"`
}

// sbom is the list of parts as CycloneDX.
func sbom(version string, binaries []string, parts []*part, direct []string) ([]byte, error) {
	var doc document
	components, graph := map[string]object{}, map[string][]string{}
	own := []any{object{"license": object{"name": "to-be-chosen"}}}
	for _, binary := range binaries {
		out, err := goCommand(os.Environ(), "run", tool, "bin", "-json", "-std", "-noserial", "-notimestamp",
			"-version", version, binary)
		if err != nil {
			return nil, err
		}
		doc = document{}
		if err := json.Unmarshal(experiments.ReplaceAll(out, nil), &doc); err != nil {
			return nil, err
		}
		program := doc.Metadata.Component
		program["name"], program["licenses"] = filepath.Base(binary), own
		for _, p := range doc.Metadata.Properties {
			if p.Name == "cdx:gomod:binary:hash:SHA-256" {
				program["hashes"] = []any{object{"alg": "SHA-256", "content": p.Value}}
			}
		}
		direct = append(direct, program["bom-ref"].(string))
		for _, c := range append(doc.Components, program) {
			components[c["bom-ref"].(string)] = c
		}
		for _, d := range doc.Dependencies {
			graph[d.Ref] = d.On
		}
	}
	for _, p := range parts {
		c := components[p.ref]
		if c == nil && p.sum == nil {
			return nil, fmt.Errorf("%s lists no %s", tool, p.ref)
		} else if c == nil {
			c = object{"bom-ref": p.ref, "type": "library", "name": p.name, "version": p.version, "scope": "required",
				"purl": p.ref, "hashes": []any{object{"alg": "SHA-512", "content": hex.EncodeToString(p.sum)}}}
			components[p.ref], graph[p.ref] = c, p.needs
		}
		c["licenses"] = []any{object{"expression": p.expression()}}
		if id := p.expression(); !strings.Contains(id, " ") && !strings.HasPrefix(id, "LicenseRef-") {
			c["licenses"] = []any{object{"license": object{"id": id}}}
		}
	}
	doc.Metadata.Properties = nil
	for _, t := range doc.Metadata.Tools {
		delete(t, "hashes") // of a build of this machine
	}
	doc.Metadata.Component = object{"bom-ref": "countersign", "type": "application", "name": "countersign",
		"version": version, "licenses": own}
	graph["countersign"] = direct
	doc.Components, doc.Dependencies = nil, nil
	for _, ref := range slices.Sorted(maps.Keys(components)) {
		if components[ref]["licenses"] == nil {
			return nil, fmt.Errorf("%s lists %s, which no package of the source tree is from", tool, ref)
		}
		doc.Components = append(doc.Components, components[ref])
	}
	for _, ref := range slices.Sorted(maps.Keys(graph)) {
		slices.Sort(graph[ref])
		doc.Dependencies = append(doc.Dependencies, dependency{ref, slices.Compact(graph[ref])})
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", " ")
	err := e.Encode(doc)
	return b.Bytes(), err
}
