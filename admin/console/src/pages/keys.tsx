import { useState } from "preact/hooks";
import { ActDialog } from "../act";
import { Refused, call, may, mayPropose, page } from "../api";
import { hex, sha256 } from "../bytes";
import type { Key as KeyDoc, Line, Requested } from "../generated";
import { assertion } from "../passkey";
import { go, link, route, setQuery } from "../router";
import { myRoles } from "../session";
import { useStore } from "../store";
import { Dialog, Empty, Facts, Field, Form, Id, Input, Load, Page, Section, Select, Shape, State, Table, Text, Time, count, plural, span, useList, useLoad } from "../ui";
import { custodyOf, keyMeans, keyTone, origin } from "../words";

export function Keys() {
  const { query } = useStore(route);
  const find = query.get("find") ?? "";
  const mine = myRoles();
  const [making, setMaking] = useState(false);
  const list = useList((after, signal) => page("GET /v1/keys", { query: { find, after, limit: 50 }, signal }), [find], ["rotation"]);
  return <Page title="Keys" lead="Lines of key versions. One version of a line is active; the next one is announced and committed to beforehand."
    actions={may(mine, "POST /v1/keys") && <button type="button" class="primary" onClick={() => setMaking(true)}>Create a key…</button>}>
    <Section title="Versions">
      <form class="row" role="search" onSubmit={(e) => e.preventDefault()}>
        <Field label="Name contains">{(id) => <input id={id} type="search" value={find} onInput={(e) => setQuery({ find: e.currentTarget.value })} />}</Field>
      </form>
      <Load of={list}>{() => <Table name="Versions of keys" rows={list.items} id={(k) => k.name + "/" + k.version} more={list.more} loading={list.loadingMore}
        empty={find ? <Empty title={`No key has “${find}” in its name.`} /> : <Empty title="There is no key.">A key is made in the device, and never leaves it. Create one for each purpose: payments, invoices.</Empty>} columns={[
          { head: "Key", name: true, cell: (k) => <><a href={link("keys", k.name)}><Text>{k.name}</Text> <span class="quiet">/{k.version}</span></a>{k.own && <span class="quiet"> · the appliance’s own</span>}</> },
          { head: "State", cell: (k) => <KeyState k={k} /> },
          { head: "Custody", cell: (k) => <span class="word" title={custodyOf(k)[1]}>{custodyOf(k)[0]}</span> },
          { head: "Algorithm", quiet: true, cell: (k) => k.algorithm },
          { head: "Signatures", num: true, cell: (k) => count(k.uses) },
          { head: "Public key", quiet: true, cell: (k) => <Id of="public key">{k.public_key}</Id> },
          { head: "Created", quiet: true, cell: (k) => <Time s={k.created} /> },
        ]} />}</Load>
    </Section>
    {making && <Create close={() => setMaking(false)} done={(name) => { setMaking(false); go(link("keys", name)); }} />}
  </Page>;
}

function KeyState({ k }: { k: KeyDoc }) {
  return <State tone={k.compromised ? "crit" : keyTone[k.state] ?? "off"}>{k.state}{k.compromised && k.state !== "compromised" ? ", compromised" : ""}</State>;
}

function Create({ close, done }: { close: () => void; done: (name: string) => void }) {
  const [name, setName] = useState("");
  const [algorithm, setAlgorithm] = useState("ed25519");
  const [token, setToken] = useState("");
  const tokens = useLoad((signal) => call("GET /v1/tokens", { signal }), []);
  return <Dialog title="Create a key" close={close}>
    <Form submit="Create" cancel={close} act={async () => {
      await call("POST /v1/keys", { body: { name, algorithm: algorithm as "ed25519", ...(token ? { token } : {}) } });
      done(name);
    }}>
      <Input label="Name" value={name} set={setName} required maxLength={64} help="Of the line: lower-case letters, digits and hyphens, for example payments." />
      <Select label="Algorithm" value={algorithm} set={setAlgorithm} options={[["ed25519", "Ed25519"], ["p256", "P-256 (for TLS)"]]} />
      {tokens.data && tokens.data.length > 1 && <Select label="Token" value={token} set={setToken} options={[["", "Choose one"], ...tokens.data.map((t) => [t.name, t.name] as [string, string])]} />}
      <p class="help">The device makes the key. Nobody can use it yet: policy says who may.</p>
    </Form>
  </Dialog>;
}

export function Key({ name }: { name: string }) {
  const mine = myRoles();
  const of = useLoad((signal) => call("GET /v1/keys/{name}", { path: { name }, signal }), [name], ["rotation", "acknowledgement"]);
  const line = useLoad((signal) => call("GET /v1/keys/{name}/line", { path: { name }, signal }), [name], ["rotation", "acknowledgement", "change"]);
  const [asking, setAsking] = useState<"" | "rotate" | "schedule" | "cancel">("");
  const [act, setAct] = useState<{ act: string; k: KeyDoc } | null>(null);
  const close = () => setAsking("");
  const reload = () => { of.reload(); line.reload(); };
  const l = line.data;
  const rotating = l?.rotation && !l.rotation.cancelled && l.rotation.activates_at * 1000 > Date.now();
  return <Page title={<Text>{name}</Text>} back={{ to: "/keys", name: "Keys" }} actions={l && <>
    {may(mine, "POST /v1/keys/{name}/rotate") && <button type="button" class="primary" onClick={() => setAsking("rotate")}>Rotate…</button>}
    {(rotating || l.requested) && may(mine, "POST /v1/keys/{name}/rotate/cancel") && <button type="button" onClick={() => setAsking("cancel")}>Call off…</button>}
    {may(mine, "PATCH /v1/keys/{name}/line") && <button type="button" onClick={() => setAsking("schedule")}>Schedule…</button>}
  </>}>
    <Load of={line}>{(l) => <>
      <RotationSheet line={l} />
      {l.presence > 0 && <Presence name={name} line={l} done={line.reload} />}
    </>}</Load>
    <Section title="Line of succession" note="Each version endorses the next, and commits to its public key before the rotation.">
      <Load of={of}>{(all) => <Succession versions={all} mine={mine} act={(act, k) => setAct({ act, k })} />}</Load>
    </Section>
    <Load of={of}>{(all) => all.some(safeguarded) ? <Load of={line}>{(l) => <RecoverySheet name={name} line={l} versions={all} done={reload} />}</Load> : null}</Load>
    <Load of={line}>{(l) => <Section title="Rules of the line">
      <Facts of={[
        ["Rotated", l.every ? "every " + span(l.every) : l.window ? "by its window" : "by hand"],
        !!l.window && ["Window (cron, UTC)", <code><Text>{l.window}</Text></code>],
        l.uses > 0 && ["After", count(l.uses) + " signatures"],
        ["Announced", l.announce ? span(l.announce) + " before" : "when it is rotated"],
        ["Grace time", l.grace ? span(l.grace) : "as long as a document may live"],
        ["Must acknowledge", l.acknowledge.length ? l.acknowledge.join(", ") : "nobody"],
        ["Presence", l.presence ? `an operator confirms, for ${span(l.presence)}` : "not needed"],
      ]} />
    </Section>}</Load>
    {asking === "rotate" && <RotateDialog name={name} line={l!} close={close} done={reload} />}
    {asking === "schedule" && <ScheduleDialog name={name} line={l!} close={close} done={reload} />}
    {asking === "cancel" && <Dialog title={`Call off the rotation of ${name}`} close={close}>
      <Form submit="Call it off" danger cancel={close} act={async () => { await call("POST /v1/keys/{name}/rotate/cancel", { path: { name } }); reload(); close(); }}>
        <p>The present version stays active. The announced one stays the committed successor: a later rotation leads to it. Peers are told.</p>
      </Form>
    </Dialog>}
    {act && <VersionAct {...act} close={() => setAct(null)} done={reload} />}
  </Page>;
}

/** safeguarded reports that a line of such a version can have a recovery successor. */
const safeguarded = (k: KeyDoc) => !k.own && k.algorithm === "ed25519" && ["active", "compromised"].includes(k.state);

function RecoverySheet({ name, line: l, versions, done }: { name: string; line: Line; versions: KeyDoc[]; done: () => void }) {
  const mine = myRoles();
  const [asking, setAsking] = useState<"" | "safeguard" | "recover">("");
  const [token, setToken] = useState("");
  const [reason, setReason] = useState("");
  const tokens = useLoad((signal) => call("GET /v1/tokens", { signal }), []);
  const others = (tokens.data ?? []).map((t) => t.name).filter((t) => !versions.some((k) => k.token === t && ["active", "pending"].includes(k.state) && !k.recovery));
  const close = () => setAsking("");
  const r = l.recovery;
  return <Section title="Recovery successor" note="After the loss of the token, the line goes on with a version on another token.">
    {r ? <Facts of={[
      ["Version", String(r.version)],
      ["Token", <><Text>{r.token}</Text>{r.absent && <span class="quiet"> · the configuration does not have it: it may lie in a safe</span>}</>],
      ["Created", <Time s={r.created} />],
      ["Commitment", <Id of="commitment">{r.commitment}</Id>],
    ]} /> : <p class="quiet">None. The line ends with its token.</p>}
    <div class="actions">
      {mayPropose(mine, "key safeguard") && others.length > 0 && <button type="button" onClick={() => setAsking("safeguard")}>{r ? "Replace…" : "Make one…"}</button>}
      {r && mayPropose(mine, "key recover") && <button type="button" class="danger" onClick={() => setAsking("recover")}>Go on with it…</button>}
    </div>
    {asking === "safeguard" && <ActDialog title={`Recovery successor of ${name}`} close={close} done={done} can={!!token}
      make={() => ({ act: "key safeguard", parameters: { key: name, token } })}>
      <Select label="Token" value={token} set={setToken} options={[["", "Choose one"], ...others.map((t) => [t, t] as [string, string])]} />
      <p class="help">Peers who pin the line from then on know of it; all others after two rotations that are announced from then on. Then the token can lie in a safe.</p>
    </ActDialog>}
    {asking === "recover" && <ActDialog title={`Recover ${name}`} name={name} close={close} done={done} can={!!reason}
      loss="The versions on the lost token never sign again. Peers who do not know of the recovery successor must pin the line again."
      make={() => ({ act: "key recover", parameters: { key: name, reason } })}>
      <Input label="Reason" value={reason} set={setReason} required maxLength={500} help="It goes into the audit log." />
    </ActDialog>}
  </Section>;
}

function RotationSheet({ line: l }: { line: Line }) {
  const r = l.rotation;
  const announced = r && !r.cancelled;
  return <Section title="Rotation" note="Changes here as it happens.">
    {announced ? <Facts of={[
      ["Version " + r.version, r.activates_at * 1000 > Date.now() ? <State tone="info">announced</State> : <State tone="ok">active</State>],
      ["Active from", <Time s={r.activates_at} />],
      ["The version before is archived", <Time s={r.retires_at} none="–" />],
      ["Public key", <Id of="public key">{hexOf(r.public_key)}</Id>],
    ]} /> : <p class="quiet">{l.next_rotation ? <>Next rotation <Time s={l.next_rotation} ago />{l.next_reason && <>: <Text>{l.next_reason}</Text></>}</> : "No rotation is announced, and none is due."}</p>}
    {l.requested && <RequestedNote r={l.requested} />}
    {announced && <div><h3>Acknowledged by peers</h3>
      {l.unacknowledged.length === 0 ? <p><State tone="ok">{l.acknowledged.length ? "All peers have acknowledged it." : "No peer is enrolled."}</State></p>
        : <><p><State tone="warn">{plural(l.unacknowledged.length, "peer has", "peers have")} not:</State></p>
          <ul class="quiet">{l.unacknowledged.slice(0, 20).map((p) => <li key={p}><a href={link("peers", p)}><Text>{p}</Text></a></li>)}</ul>
          {l.unacknowledged.length > 20 && <p class="help">and {l.unacknowledged.length - 20} more</p>}</>}
      {l.acknowledged.length > 0 && <details><summary>{plural(l.acknowledged.length, "peer has", "peers have")} acknowledged it</summary>
        <ul class="quiet">{l.acknowledged.slice(0, 200).map((p) => <li key={p}><a href={link("peers", p)}><Text>{p}</Text></a></li>)}</ul>
        {l.acknowledged.length > 200 && <p class="help">and {l.acknowledged.length - 200} more: <code>countersign admin key show</code> names all.</p>}</details>}
    </div>}
    {l.compromises.map((c) => <p class="notice crit" key={c.version}><State tone="crit">Version {c.version} is compromised. {c.unacknowledged.length ? `Not heard of it yet: ${c.unacknowledged.slice(0, 10).join(", ")}${c.unacknowledged.length > 10 ? " and more" : ""}.` : "All peers have heard of it."}</State></p>)}
  </Section>;
}

/** hexOf returns the hex of base64url. */
function hexOf(s: string): string {
  try {
    return hex(Uint8Array.from(atob(s.replaceAll("-", "+").replaceAll("_", "/")), (c) => c.charCodeAt(0)));
  } catch { return s; }
}

function RequestedNote({ r }: { r: Requested }) {
  return <p class="notice">{r.ended ? <>The rotation that <Text>{r.by}</Text> asked for has ended: <Text>{r.ended}</Text></> : <>A rotation was asked for by <Text>{r.by}</Text>; it is announced as soon as it fits, until <Time s={r.until} />.</>}</p>;
}

/** Succession draws the line: each version with its state, and whether the next one keeps the commitment. */
function Succession({ versions, mine, act }: { versions: KeyDoc[]; mine: readonly string[]; act: (act: string, k: KeyDoc) => void }) {
  const [digests, setDigests] = useState<Record<string, string>>({});
  useLoad(async () => {
    const out: Record<string, string> = {};
    for (const k of versions) {
      out[k.version] = hex(await sha256(Uint8Array.from(k.public_key.match(/../g) ?? [], (x) => parseInt(x, 16))));
    }
    setDigests(out);
  }, [versions.map((k) => k.public_key).join()]);
  const acts: [string, string, (k: KeyDoc) => boolean][] = [
    ["key archive", "Archive…", (k) => k.state === "verify-only"],
    ["key compromise", "Mark compromised…", (k) => !k.compromised && k.state !== "destroyed" && k.state !== "pending"],
    ["key destroy", "Destroy…", (k) => ["archived", "compromised"].includes(k.state)],
  ];
  return <ol class="line-drawing" aria-label="Versions, the newest first">{[...versions].reverse().map((k) => {
    const after = versions.find((x) => x.version === k.version + 1);
    const kept = after && k.next ? digests[after.version] === k.next : undefined;
    return <li key={k.version} class={k.state === "pending" ? "open" : ""}>
      <Shape tone={k.compromised ? "crit" : keyTone[k.state] ?? "off"} />
      <div>
        <h3>Version {k.version} · <span class={"state " + (k.compromised ? "crit" : keyTone[k.state] ?? "off")}>{k.state}</span></h3>
        <p class="quiet">{k.recovery ? "of the recovery successor: it signs when the line has lost its token" : keyMeans[k.state]}</p>
        <Facts of={[
          ["Public key", <Id of={"public key of version " + k.version}>{k.public_key}</Id>],
          ["Custody", <>{custodyOf(k)[0]} <span class="quiet">in <Text>{k.token}</Text>: {custodyOf(k)[1]}</span></>],
          ["Provenance", origin[k.origin] ?? k.origin],
          ["Signatures", count(k.uses)],
          ["Created", <Time s={k.created} />],
          k.activates > 0 && ["Active from", <Time s={k.activates} />],
          k.retires > 0 && [k.state === "archived" ? "Archived" : "Archived at the latest", <Time s={k.retires} />],
          !!k.next && ["Commits to", <><Id of="commitment">{k.next}</Id> {kept === undefined ? <span class="quiet">the next version</span> : kept ? <State tone="ok">kept by version {k.version + 1}</State> : <State tone="crit">broken by version {k.version + 1}</State>}</>],
        ]} />
        <div class="actions">{acts.map(([name, label, fits]) => fits(k) && mayPropose(mine, name) &&
          <button type="button" class="danger" key={name} onClick={() => act(name, k)}>{label}</button>)}</div>
      </div>
    </li>;
  })}</ol>;
}

const losses: Record<string, [title: string, loss: string]> = {
  "key archive": ["Archive", "Its signatures are refused from then on, also those of documents that are still valid."],
  "key compromise": ["Mark as compromised", "Its signatures are refused at once, and for ever; peers are told. There is no way back."],
  "key destroy": ["Destroy", "The private key is deleted from the device. There is no copy and no way back."],
};

function VersionAct({ act, k, close, done }: { act: string; k: KeyDoc; close: () => void; done: () => void }) {
  const [title, loss] = losses[act]!;
  const now = useLoad((signal) => call("GET /v1/keys/{name}", { path: { name: k.name }, signal }), [k.name]); // the page may be old
  const [reason, setReason] = useState("");
  const asks = act === "key compromise";
  return <ActDialog title={`${title}: ${k.name}/${k.version}`} loss={loss} name={k.name} submit="Propose" close={close} done={done} can={!asks || !!reason}
    make={() => ({ act, parameters: { key: k.name, version: String(k.version), ...(asks ? { reason } : {}) } })}>
    {asks && <Input label="Reason" value={reason} set={setReason} required maxLength={500} help="It goes into the audit log." />}
    <Load of={now}>{(all) => <p>Version {k.version} has made {plural(all.find((x) => x.version === k.version)?.uses ?? k.uses, "signature")}.</p>}</Load>
  </ActDialog>;
}

function RotateDialog({ name, line, close, done }: { name: string; line: Line; close: () => void; done: () => void }) {
  const [when, setWhen] = useState("announce");
  const [at, setAt] = useState("");
  return <Dialog title={`Rotate ${name}`} close={close}>
    <Form submit="Announce the rotation" cancel={close} can={when !== "at" || !!at} act={async () => {
      await call("POST /v1/keys/{name}/rotate", { path: { name }, body: when === "now" ? { now: true } : when === "at" ? { at: Math.floor(new Date(at).getTime() / 1000) } : {} });
      done();
      close();
    }}>
      <fieldset><legend>When is the next version active?</legend>
        {([["announce", `After the time of announcement: in ${span(line.announce)}`], ["at", "At a time"], ["now", "Now: peers learn of it afterwards"]] as const).map(([v, label]) =>
          <label key={v}><input type="radio" name="when" value={v} checked={when === v} onChange={() => setWhen(v)} />{label}</label>)}
      </fieldset>
      {when === "at" && <Input label="Time" type="datetime-local" value={at} set={setAt} required help="In the time zone of this browser." />}
      <p class="help">The present version signs until then, and is accepted for {line.grace ? span(line.grace) : "as long as a document may live"} more.</p>
    </Form>
  </Dialog>;
}

const units = { s: 1, min: 60, h: 3600, d: 86400 } as const;

/** seconds reads "90 d", "1 h 30 min", "300" (seconds). */
export function seconds(text: string): number {
  if (/^\s*\d+\s*$/.test(text)) return Number(text);
  if (!/^(\s*\d+\s*(s|min|h|d))+\s*$/.test(text)) return NaN;
  return [...text.matchAll(/(\d+)\s*(s|min|h|d)/g)].reduce((n, m) => n + Number(m[1]) * units[m[2] as keyof typeof units], 0);
}

function ScheduleDialog({ name, line, close, done }: { name: string; line: Line; close: () => void; done: () => void }) {
  const [v, setV] = useState({ every: span(line.every), window: line.window, uses: String(line.uses), announce: span(line.announce), grace: span(line.grace), presence: span(line.presence), acknowledge: line.acknowledge.join(", ") });
  const was = useState(v)[0];
  const set = (n: keyof typeof v) => (to: string) => setV({ ...v, [n]: to });
  const [weaker, setWeaker] = useState<Record<string, string> | null>(null);
  if (weaker) {
    return <ActDialog title={`Weaker rules for ${name}`} loss="These settings let documents or keys be used with fewer checks, so they take approval. Other changes of the form were not made: make them afterwards." close={close} done={done}
      make={() => ({ act: "key set", parameters: { key: name, ...weaker } })}>
      <Facts of={Object.entries(weaker).map(([n, x]): [string, string] => [n, n === "acknowledge" ? x : span(Number(x))])} />
    </ActDialog>;
  }
  const bad = (["every", "announce", "grace", "presence"] as const).filter((n) => v[n] !== was[n] && Number.isNaN(seconds(v[n])));
  return <Dialog title={`Rules of ${name}`} close={close}>
    <Form submit="Set" cancel={close} can={!bad.length} act={async () => {
      const body: Record<string, unknown> = {};
      for (const n of ["every", "announce", "grace", "presence"] as const) if (v[n] !== was[n]) body[n] = seconds(v[n]);
      if (v.window !== was.window) body.window = v.window;
      if (v.uses !== was.uses) body.uses = Number(v.uses);
      if (v.acknowledge !== was.acknowledge) body.acknowledge = v.acknowledge.split(",").map((x) => x.trim()).filter(Boolean);
      try {
        await call("PATCH /v1/keys/{name}/line", { path: { name }, body });
      } catch (e) {
        if (!(e instanceof Refused && e.code === "needs_approval" && mayPropose(myRoles(), "key set"))) throw e;
        const weaker = ["grace", "presence", "acknowledge"].filter((n) => n in body);
        setWeaker(Object.fromEntries(weaker.map((n) => [n, Array.isArray(body[n]) ? (body[n] as string[]).join(",") || "none" : String(body[n])])));
        return;
      }
      done();
      close();
    }}>
      <Input label="Rotate every" value={v.every} set={set("every")} help="For example 90 d; 0: not by age." />
      <Input label="Window" value={v.window} set={set("window")} help="Cron, five fields, UTC: for example 0 3 * * 1. Empty: at any time." />
      <Input label="Rotate after signatures" value={v.uses} set={set("uses")} inputMode="numeric" help="0: not by use." />
      <Input label="Announce before" value={v.announce} set={set("announce")} help="For example 2 d." />
      <Input label="Grace time" value={v.grace} set={set("grace")} help="A shorter one takes approval." />
      <Input label="Must acknowledge" value={v.acknowledge} set={set("acknowledge")} help="Peers with commas in between; all; or nobody." />
      <Input label="Presence" value={v.presence} set={set("presence")} help="How long an operator's confirmation lets it sign; 0: none is needed." />
      {bad.length > 0 && <State tone="warn">Not a time: {bad.join(", ")}. Write 90 d, 12 h, 5 min or 30 s.</State>}
    </Form>
  </Dialog>;
}

function Presence({ name, line, done }: { name: string; line: Line; done: () => void }) {
  const confirmed = line.confirmed * 1000 > Date.now();
  return <Section title="Presence" note={`An operator confirms for ${span(line.presence)}.`}>
    {confirmed ? <State tone="ok">It may sign until <Time s={line.confirmed} />.</State> : <State tone="warn">It does not sign: nobody has confirmed.</State>}
    {may(myRoles(), "POST /v1/keys/{name}/confirm") && <Form submit="Confirm with passkey" act={async () => {
      const c = await call("POST /v1/challenges", { body: { purpose: "presence", key: name } });
      await call("POST /v1/keys/{name}/confirm", { path: { name }, body: { challenge: c.id, proof: await assertion(c.public_key) } });
      done();
    }} />}
  </Section>;
}
