// Builds the console: types of ../openapi.json, type check, bundle, compressed assets in dist/.
// The output depends on the sources and package-lock.json only. package console embeds dist/.
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { brotliCompressSync, constants, gzipSync } from "node:zlib";
import { build } from "esbuild";

const here = fileURLToPath(new URL(".", import.meta.url));
process.chdir(here);

// maxBytes is the budget of JavaScript and CSS as sent, without what a page loads by itself later.
const maxBytes = 150 * 1024;

writeFileSync("src/generated.ts", types(JSON.parse(readFileSync("../openapi.json", "utf8"))));
writeFileSync("src/help.ts", help(readFileSync("../../docs/OPERATIONS.md", "utf8")));

const checked = spawnSync(process.execPath, ["node_modules/typescript/bin/tsc"], { stdio: "inherit" });
if (checked.status !== 0) process.exit(1);

const { metafile } = await build({
  entryPoints: { app: "src/main.tsx", style: "src/style.css" },
  bundle: true,
  splitting: true,
  format: "esm",
  target: "es2023",
  minify: true,
  legalComments: "none",
  jsx: "automatic",
  jsxImportSource: "preact",
  conditions: ["browser", "production"],
  outdir: "out",
  entryNames: "[name]-[hash]",
  chunkNames: "[name]-[hash]",
  metafile: true,
  write: false,
  logLevel: "warning",
}).then((made) => {
  for (const name of readdirSync("dist")) if (name !== ".gitignore") rmSync("dist/" + name, { recursive: true });
  mkdirSync("dist/assets");
  for (const file of made.outputFiles) {
    writeAsset(file.path.slice(file.path.lastIndexOf("/") + 1), file.contents);
  }
  return made;
});

const entries = {};
const first = new Set(); // loaded before the first page
for (const [path, out] of Object.entries(metafile.outputs)) {
  if (out.entryPoint) entries[out.entryPoint] = path;
}
const need = (path) => {
  if (first.has(path)) return;
  first.add(path);
  for (const each of metafile.outputs[path].imports) if (each.kind === "import-statement") need(each.path);
};
need(entries["src/main.tsx"]);
need(entries["src/style.css"]);
let bytes = 0;
for (const path of first) bytes += readFileSync("dist/assets/" + path.slice(4) + ".br").length;
if (bytes > maxBytes) {
  console.error(`console: ${bytes} bytes compressed are more than ${maxBytes}`);
  process.exit(1);
}
const icon = readFileSync("src/icon.svg");
const iconName = `icon-${createHash("sha256").update(icon).digest("hex").slice(0, 8)}.svg`;
writeAsset(iconName, icon);
const asset = (entry) => "/assets/" + entries[entry].slice("out/".length);
const index = readFileSync("src/index.html", "utf8")
  .replace("STYLE", asset("src/style.css"))
  .replace("ICON", "/assets/" + iconName)
  .replace("SCRIPT", asset("src/main.tsx"));
write("index.html", Buffer.from(index));
console.log(`console: built; ${(bytes / 1024).toFixed(1)} KB of JavaScript and CSS compressed, ` +
  `${Object.keys(metafile.outputs).length} assets`);

function writeAsset(name, content) { write("assets/" + name, content); }

// write writes a file with its compressed forms.
function write(name, content) {
  writeFileSync("dist/" + name, content);
  writeFileSync("dist/" + name + ".gz", gzipSync(content, { level: 9 }));
  writeFileSync("dist/" + name + ".br",
    brotliCompressSync(content, { params: { [constants.BROTLI_PARAM_QUALITY]: 11 } }));
}

// help returns what docs/OPERATIONS.md says of each alert, under a heading with the alert's code: paragraphs of text and
// code, and titles of other sections in the place of links.
function help(doc) {
  const out = {};
  for (const section of doc.split(/^### /m).slice(1)) {
    const [, code, body] = /^([a-z]+(?:-[a-z]+)*)\n([^]*?)(?=^## |(?![^]))/m.exec(section) ?? [];
    if (!code) continue;
    out[code] = body.trim().split(/\n\n+/).map((paragraph) =>
      paragraph.replace(/\n/g, " ").split(/(`[^`]*`|\[[^\]]*\]\([^)]*\))/).filter(Boolean).map((part) => {
        if (part[0] === "`") return { code: part.slice(1, -1) };
        const link = /^\[([^\]]*)\]\(([^)#]*)/.exec(part);
        return link ? { title: link[1], of: "docs/" + (link[2] || "OPERATIONS.md") } : part;
      }));
  }
  return `// Made by build.mjs from docs/OPERATIONS.md.
export type Part = string | { code: string } | { title: string; of: string };
export const help: Record<string, Part[][]> = ${JSON.stringify(out, null, 1)};
`;
}

// types returns TypeScript types of an OpenAPI document: an interface for each schema, and for each
// operation its parameters, its body, its answer and its roles.
function types(doc) {
  const out = ["// Made by build.mjs from openapi.json.", ""];
  const schemaType = (s) => {
    if (!s) return "undefined";
    if (s.$ref) return s.$ref.split("/").pop();
    if (s.enum) return s.enum.map((v) => JSON.stringify(v)).join(" | ");
    const kinds = [].concat(s.type ?? []);
    const one = (kind) => {
      switch (kind) {
        case "array": return `Array<${schemaType(s.items)}>`;
        case "integer": case "number": return "number";
        case "string": return "string";
        case "boolean": return "boolean";
        case "null": return "null";
        case "object": {
          if (s.properties) return `{ ${members(s).join(" ")} }`;
          const more = s.additionalProperties;
          return `Record<string, ${more && more !== true ? schemaType(more) : "unknown"}>`;
        }
      }
      throw new Error("openapi.json has a schema that build.mjs does not know: " + JSON.stringify(s));
    };
    return kinds.length ? kinds.map(one).join(" | ") : "unknown";
  };
  const members = (s) => Object.entries(s.properties).map(([name, p]) => {
    const optional = s.required?.includes(name) ? "" : "?";
    return `${JSON.stringify(name)}${optional}: ${schemaType(p)};`;
  });
  for (const [name, s] of Object.entries(doc.components.schemas)) {
    out.push(`export interface ${name} {`, ...members(s).map((m) => "  " + m), "}", "");
  }
  const roles = {};
  out.push("export interface Operations {");
  for (const [path, methods] of Object.entries(doc.paths)) {
    for (const [method, o] of Object.entries(methods)) {
      const name = `${method.toUpperCase()} ${path}`;
      const parameters = (where) => {
        const all = (o.parameters ?? []).filter((p) => p.in === where);
        return `{ ${all.map((p) => `${JSON.stringify(p.name)}${p.required ? "" : "?"}: ${schemaType(p.schema)};`).join(" ")} }`;
      };
      const content = (x) => Object.values(x?.content ?? {})[0]?.schema;
      const good = Object.entries(o.responses).find(([status]) => status[0] === "2")?.[1];
      out.push(`  ${JSON.stringify(name)}: {`, `    path: ${parameters("path")};`, `    query: ${parameters("query")};`,
        `    body: ${schemaType(content(o.requestBody))};`, `    answer: ${schemaType(content(good))};`, "  };");
      roles[name] = o["x-roles"] ?? [];
    }
  }
  out.push("}", "", `export const roles: Record<keyof Operations, readonly string[]> = ${JSON.stringify(roles, null, 2)};`, "");
  out.push(`export const proposers: Record<string, readonly string[]> = ${JSON.stringify(doc["x-acts"] ?? {}, null, 2)};`, "");
  out.push(`export const eventTypes: readonly string[] = ${JSON.stringify(doc["x-events"])};`, "");
  return out.join("\n");
}
