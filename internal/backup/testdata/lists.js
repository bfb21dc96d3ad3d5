// Reads a file of lists of writes by docs/SPEC.md alone: node lists.js FILE IDENTITY. Prints a line
// for each list: its number and its bytes in hex.
const { createHash, createPublicKey, verify } = require("node:crypto");
const { execFileSync } = require("node:child_process");
const { readFileSync } = require("node:fs");
const { inflateRawSync } = require("node:zlib");

const [file, identity] = process.argv.slice(2);
const b = readFileSync(file);
const magic = "countersign-lists-v1\n";
if (b.toString("latin1", 0, magic.length) !== magic) throw new Error("no file of lists");
const head = b.subarray(0, magic.length + 32);
const spki = Buffer.concat([Buffer.from("302a300506032b6570032100", "hex"), head.subarray(magic.length)]);
const key = createPublicKey({ key: spki, format: "der", type: "spki" });

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let i = 0; i < 8; i++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

for (let at = head.length; at < b.length; ) {
  const length = b.readUInt32BE(at);
  const numbers = b.subarray(at + 4, at + 20);
  if (crc32(b.subarray(at, at + 20)) !== b.readUInt32BE(at + 20)) throw new Error("checksum");
  const signature = b.subarray(at + 24, at + 88);
  const sealed = b.subarray(at + 88, at + 88 + length);
  const digest = createHash("sha256").update(sealed).digest();
  if (!verify(null, Buffer.concat([head, numbers, digest]), key, signature)) throw new Error("signature");
  const plain = inflateRawSync(execFileSync("age", ["--decrypt", "--identity", identity], { input: sealed }));
  let number = numbers.readBigUInt64BE(0);
  for (let i = 0; i < plain.length; number++) {
    const end = i + 4 + plain.readUInt32BE(i);
    console.log(`${number} ${plain.toString("hex", i + 4, end)}`);
    i = end;
  }
  if (number !== numbers.readBigUInt64BE(8) + 1n) throw new Error("number of lists");
  at += 88 + length;
}
