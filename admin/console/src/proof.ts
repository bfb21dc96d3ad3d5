// The audit log, checked in this browser: signed checkpoints (C2SP tlog-checkpoint, Ed25519),
// inclusion and consistency proofs (RFC 9162 section 2.1), SHA-256. The browser pins the log's key
// and the newest checkpoint of each epoch. The appliance's word is not taken for anything here.
import { Refused, call } from "./api";
import { type Bytes, hex, sha256, utf8 } from "./bytes";
import type { EventProof } from "./generated";

/** Pin is what this browser knows of the log. It is in localStorage: it outlives sessions. */
export type Pin = { key: string; name: string; epochs: Record<string, { size: number; root: string; note: string; at: number }> };

export type Step = { what: string; ok: boolean; detail: string };
export type Checked = { ok: boolean; rewritten: boolean; steps: Step[]; leaf: string; size: number; root: string; pinnedAt: number };

const storage = "countersign-log";

export function pin(): Pin | null {
  try { return JSON.parse(localStorage.getItem(storage) ?? "null") as Pin | null; } catch { return null; }
}

export const forgetPin = () => localStorage.removeItem(storage);

const unhex = (s: string): Bytes => {
  if (!/^([0-9a-f]{2})*$/.test(s)) throw new Failed(`"${s.slice(0, 20)}" is not hex`);
  return Uint8Array.from(s.match(/../g) ?? [], (x) => parseInt(x, 16));
};
const unbase64 = (s: string): Bytes => Uint8Array.from(atob(s), (c) => c.charCodeAt(0));

/** Failed is a check that does not hold. */
class Failed extends Error {}

function need(holds: boolean, why: string): asserts holds {
  if (!holds) throw new Failed(why);
}

const leafHash = (leaf: Uint8Array) => sha256(Uint8Array.of(0), leaf);
const nodeHash = (left: Uint8Array, right: Uint8Array) => sha256(Uint8Array.of(1), left, right);
const equal = (a: Uint8Array, b: Uint8Array) => hex(a) === hex(b);

/** includedRoot returns the root that a leaf and its path give (RFC 9162 section 2.1.3.2). */
export async function includedRoot(leaf: Uint8Array, index: number, size: number, path: Uint8Array[]): Promise<Bytes> {
  need(index < size, `the tree has ${size} leaves, and no leaf ${index}`);
  let fn = BigInt(index), sn = BigInt(size - 1), r = await leafHash(leaf);
  for (const p of path) {
    need(sn !== 0n, "the path is too long");
    if (fn & 1n || fn === sn) {
      r = await nodeHash(p, r);
      while (!(fn & 1n) && fn !== 0n) { fn >>= 1n; sn >>= 1n; }
    } else r = await nodeHash(r, p);
    fn >>= 1n;
    sn >>= 1n;
  }
  need(sn === 0n, "the path is too short");
  return r;
}

/** continues checks that a tree continues an earlier one (RFC 9162 section 2.1.4.2). */
export async function continues(first: number, second: number, firstRoot: Uint8Array, secondRoot: Uint8Array, path: Uint8Array[]): Promise<void> {
  need(first <= second, `the log has ${second} leaves; this browser has seen ${first}`);
  if (first === second) {
    need(path.length === 0, "the path is too long");
    return need(equal(firstRoot, secondRoot), "two trees of one size have different roots");
  }
  need(first > 0, "an empty tree proves nothing");
  const all = (first & (first - 1)) === 0 && Number.isSafeInteger(first) && Math.log2(first) % 1 === 0 ? [firstRoot, ...path] : [...path];
  need(all.length > 0, "the path is too short");
  let fn = BigInt(first - 1), sn = BigInt(second - 1);
  while (fn & 1n) { fn >>= 1n; sn >>= 1n; }
  let fr = all[0]!, sr = all[0]!;
  for (const c of all.slice(1)) {
    need(sn !== 0n, "the path is too long");
    if (fn & 1n || fn === sn) {
      fr = await nodeHash(c, fr);
      sr = await nodeHash(c, sr);
      while (!(fn & 1n) && fn !== 0n) { fn >>= 1n; sn >>= 1n; }
    } else sr = await nodeHash(sr, c);
    fn >>= 1n;
    sn >>= 1n;
  }
  need(sn === 0n, "the path is too short");
  need(equal(fr, firstRoot), "the earlier tree is not the one that this browser has seen");
  need(equal(sr, secondRoot), "the path does not lead to the present root");
}

export type Head = { origin: string; size: number; root: Bytes };

/** openCheckpoint verifies the signature of a checkpoint by the log's key. */
export async function openCheckpoint(note: string, name: string, publicKey: Bytes): Promise<Head> {
  const at = note.indexOf("\n\n");
  need(at > 0, "the checkpoint has no signature");
  const body = utf8(note.slice(0, at + 1));
  const id = (await sha256(utf8(name + "\n"), Uint8Array.of(1), publicKey)).slice(0, 4);
  const key = await crypto.subtle.importKey("raw", publicKey, { name: "Ed25519" }, false, ["verify"]);
  let good = false;
  for (const line of note.slice(at + 2).split("\n").filter(Boolean)) {
    const m = /^\u2014 (\S+) (\S+)$/.exec(line);
    need(m !== null, "the checkpoint has a malformed signature");
    const b = unbase64(m[2]!);
    if (m[1] !== name || !equal(b.slice(0, 4), id)) continue;
    need(await crypto.subtle.verify("Ed25519", key, b.slice(4), body), "the signature of the checkpoint is wrong");
    good = true;
  }
  need(good, `the checkpoint is not signed by ${name}`);
  const [origin, size, root] = note.split("\n");
  need(origin === name, `the checkpoint is of ${origin}, not of ${name}`);
  need(/^(0|[1-9]\d{0,14})$/.test(size!), "the checkpoint has no size");
  const r = unbase64(root!);
  need(r.length === 32, "the checkpoint has no root");
  return { origin: origin!, size: Number(size), root: r };
}

/** logKey parses a verifier key, which names the log by its public key. */
async function logKey(verifier: string): Promise<{ base: string; key: Bytes }> {
  const m = /^(countersign\/([0-9a-f]{16}))\/\d+\+[0-9a-f]{8}\+(\S+)$/.exec(verifier);
  need(m !== null, "the log's key has another form");
  const b = unbase64(m[3]!);
  need(b.length === 33 && b[0] === 1, "the log's key is no Ed25519 key");
  need(hex(b.slice(1, 9)) === m[2], "the log's name is not that of its key");
  return { base: m[1]!, key: b.slice(1) };
}

/** longestChain is the number of epochs that are followed back: ten years of months. */
const longestChain = 120;

/**
 * chain follows the epochs back from the one of a proof to the newest one that this browser has pinned before. The first
 * event of each epoch names the end of the epoch before, whose signed checkpoint must be just that, and must continue what
 * was pinned. It returns what was followed.
 */
async function chain(log: { base: string; key: Bytes }, proof: EventProof, head: Head, known: Pin, before: number, signal?: AbortSignal): Promise<string> {
  if (proof.epoch - before > longestChain) return `epoch ${before}, which this browser has seen, is more than ${longestChain} epochs back: not compared`;
  let first = proof.event - proof.index, epoch = proof.epoch, of = head;
  const proven = async (event: number, seen?: number): Promise<EventProof> =>
    call("GET /v1/events/{event}/proof", { path: { event }, query: seen === undefined ? {} : { seen }, signal });
  while (epoch > before) {
    let begin: EventProof, end: EventProof;
    try {
      begin = await proven(first);
      end = await proven(first - 1, epoch - 1 === before ? known.epochs[before]!.size : undefined);
    } catch (e) {
      if (e instanceof Refused && e.code === "not_found") return `retention has dropped epochs after ${before}, which this browser has seen: not compared`;
      throw e;
    }
    const top = await openCheckpoint(begin.checkpoint, `${log.base}/${epoch}`, log.key);
    need(begin.epoch === epoch && begin.index === 0 && begin.event === first && top.size >= of.size, `event ${first} does not begin epoch ${epoch}`);
    need(equal(await includedRoot(utf8(begin.leaf), 0, top.size, begin.path.map(unhex)), top.root), `the first event of epoch ${epoch} is not in its tree`);
    const m = (JSON.parse(begin.leaf) as { type: string; metadata?: Record<string, string> });
    const last = await openCheckpoint(end.checkpoint, `${log.base}/${epoch - 1}`, log.key);
    need(m.type === "EpochBegun" && m.metadata?.previous_size === String(last.size) && equal(unbase64(m.metadata.previous_root ?? ""), last.root),
      `epoch ${epoch} does not continue the end of epoch ${epoch - 1}`);
    need(end.epoch === epoch - 1 && end.index === last.size - 1, `event ${first - 1} does not end epoch ${epoch - 1}`);
    epoch--;
    first = end.event - end.index;
    of = last;
    if (epoch === before) {
      const pinned = known.epochs[before]!;
      await continues(pinned.size, last.size, unhex(pinned.root), last.root, end.consistency.map(unhex));
    }
  }
  return `epoch ${proof.epoch} follows epoch ${before}, of which this browser saw ${known.epochs[before]!.size} events`;
}

/** checkEvent fetches the proof of an event and checks it against what this browser has pinned. */
export async function checkEvent(index: number, verifier: string | undefined, shown: unknown, signal?: AbortSignal): Promise<Checked> {
  const steps: Step[] = [];
  const out: Checked = { ok: false, rewritten: false, steps, leaf: "", size: 0, root: "", pinnedAt: 0 };
  const step = async <T>(what: string, check: () => Promise<[T, string]>): Promise<T> => {
    try {
      const [value, detail] = await check();
      steps.push({ what, ok: true, detail });
      return value;
    } catch (e) {
      if (!(e instanceof Failed) && !(e instanceof DOMException)) throw e;
      steps.push({ what, ok: false, detail: e.message });
      throw new Failed(e.message);
    }
  };
  let known = pin();
  // The proof is of the newest checkpoint; the epoch is not known before the first answer.
  let proof: EventProof = await call("GET /v1/events/{event}/proof", { path: { event: index }, signal });
  const seen = known?.epochs[proof.epoch];
  if (seen) proof = await call("GET /v1/events/{event}/proof", { path: { event: index }, query: { seen: seen.size }, signal });
  out.leaf = proof.leaf;
  try {
    const log = await step("The log is the one that this browser knows", async () => {
      if (known) {
        const k = { base: known.name, key: unhex(known.key) };
        if (verifier) need((await logKey(verifier)).base === k.base, `this browser knows the log ${k.base}, and the appliance says ${verifier}: another appliance, or a log that was begun anew`);
        return [k, k.base];
      }
      need(!!verifier, "your roles do not let this browser learn the log's key");
      const k = await logKey(verifier);
      return [k, `${k.base}; its key is pinned in this browser now`];
    });
    const name = `${log.base}/${proof.epoch}`;
    const head = await step("The checkpoint is signed by the log's key (Ed25519)", async () => {
      const h = await openCheckpoint(proof.checkpoint, name, log.key);
      return [h, `${h.size} events of epoch ${proof.epoch}`];
    });
    out.size = head.size;
    out.root = hex(head.root);
    await step("The log continues the one that this browser saw last", async () => {
      if (!seen) {
        const before = Math.max(-1, ...Object.keys(known?.epochs ?? {}).map(Number).filter((n) => n < proof.epoch));
        if (before < 0) return [null, "this browser had not seen this epoch, and none before: its checkpoint is pinned now"];
        try {
          return [null, await chain(log, proof, head, known!, before, signal)];
        } catch (e) {
          out.rewritten = e instanceof Failed;
          throw e;
        }
      }
      out.pinnedAt = seen.at;
      try {
        await continues(seen.size, head.size, unhex(seen.root), head.root, proof.consistency.map(unhex));
      } catch (e) {
        out.rewritten = true;
        throw e;
      }
      return [null, `from ${seen.size} to ${head.size} events`];
    });
    await step("The event is in the log (SHA-256, from leaf to root)", async () => {
      const root = await includedRoot(utf8(proof.leaf), proof.index, head.size, proof.path.map(unhex));
      need(equal(root, head.root), "the event and its path do not lead to the signed root");
      return [null, `leaf ${proof.index}, ${proof.path.length} hashes`];
    });
    await step("The event of the log is the one that is shown", async () => {
      need(proof.event === index, `the proof is of event ${proof.event}`);
      need(same(JSON.parse(proof.leaf), shown), "the list shows another event than the log has");
      return [null, "the same in each field"];
    });
    known = { key: hex(log.key), name: log.base, epochs: { ...known?.epochs } };
    if (!seen || head.size >= seen.size) {
      known.epochs[proof.epoch] = { size: head.size, root: out.root, note: proof.checkpoint, at: Date.now() };
    }
    localStorage.setItem(storage, JSON.stringify(known));
    out.ok = true;
  } catch (e) {
    if (!(e instanceof Failed)) throw e;
  }
  return out;
}

/** same compares two JSON documents, without their order of names, and without the index that a list adds. */
function same(a: unknown, b: unknown): boolean {
  const sorted = (v: unknown): unknown => v && typeof v === "object" && !Array.isArray(v)
    ? Object.fromEntries(Object.entries(v).filter(([k]) => k !== "index").sort(([x], [y]) => x < y ? -1 : 1).map(([k, x]) => [k, sorted(x)])) : v;
  return JSON.stringify(sorted(a)) === JSON.stringify(sorted(b));
}
