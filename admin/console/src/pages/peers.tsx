import { useEffect, useState } from "preact/hooks";
import { ActDialog } from "../act";
import { call, may, mayPropose, page } from "../api";
import type { Peer as PeerDoc, PeerKey } from "../generated";
import { go, link, route, setQuery } from "../router";
import { myRoles } from "../session";
import { useStore } from "../store";
import { Command, Confirm, Empty, Facts, Field, Id, Input, Load, Page, Section, Spark, State, Table, Text, Time, Words, bytes, count, figure, plural, useList, useLoad } from "../ui";

export function Peers() {
  const { query } = useStore(route);
  const find = query.get("find") ?? "";
  const mine = myRoles();
  const [adding, setAdding] = useState(false);
  const list = useList((after, signal) => page("GET /v1/peers", { query: { find, after, limit: 50 }, signal }), [find], ["change"]);
  return <Page title="Peers" lead="The payment servers that may connect. What each may have signed, policy decides."
    actions={mayPropose(mine, "peer add") && <button type="button" class="primary" onClick={() => setAdding(true)}>Enrol a peer…</button>}>
    <Section title="Enrolled">
      <form class="row" role="search" onSubmit={(e) => e.preventDefault()}>
        <Field label="Name contains">{(id) => <input id={id} type="search" value={find} onInput={(e) => setQuery({ find: e.currentTarget.value })} />}</Field>
      </form>
      <Load of={list}>{() => <Table name="Peers" rows={list.items} id={(p) => p.name} more={list.more} loading={list.loadingMore}
        empty={find ? <Empty title={`No peer has “${find}” in its name.`} /> : <Empty title="No peer is enrolled.">
          <p>A payment server makes its identity with <code>countersign keygen FILE</code> and gives you the public key. Enrol the key here; it takes approval.</p></Empty>} columns={[
          { head: "Peer", cell: (p) => <a href={link("peers", p.name)}><Text>{p.name}</Text></a> },
          { head: "State", cell: (p) => <PeerState peer={p} /> },
          { head: "Connections", num: true, cell: (p) => p.connections },
          { head: "Last seen", cell: (p) => <Time s={p.last_seen} ago /> },
          { head: "Public key", quiet: true, cell: (p) => <>{p.keys[0] && <Id of={"public key of " + p.name}>{p.keys[0].public_key}</Id>}{p.keys.length > 1 && <span class="quiet"> and {p.keys.length - 1} more</span>}</> },
          { head: "Enrolled", quiet: true, cell: (p) => <Time s={p.added} /> },
        ]} />}</Load>
    </Section>
    {may(mine, "GET /v1/handshakes/refused") && <Strangers />}
    {adding && <Add close={() => setAdding(false)} done={list.reload} />}
  </Page>;
}

function PeerState({ peer: p }: { peer: PeerDoc }) {
  return p.suspended ? <State tone="warn">suspended</State> : p.connections ? <State tone="ok">connected</State> : <State tone="off">not connected</State>;
}

/** keyOf finds the public key in what countersign keygen prints or writes, and takes nothing else. */
const keyOf = (text: string): string =>
  /^# public key: *([0-9a-f]{64})$/m.exec(text)?.[1] ?? /^\s*([0-9a-f]{64})\s*$/i.exec(text)?.[1]?.toLowerCase() ?? "";

function KeyInput({ value, set }: { value: string; set: (v: string) => void }) {
  const [over, setOver] = useState(false);
  const [without, setWithout] = useState(false);
  return <div onDragOver={(e) => { e.preventDefault(); setOver(true); }} onDragLeave={() => setOver(false)} onDrop={async (e) => {
    e.preventDefault();
    setOver(false);
    const file = e.dataTransfer?.files[0];
    const text = file ? await file.slice(0, 4096).text() : e.dataTransfer?.getData("text") ?? "";
    set(keyOf(text));
    setWithout(!keyOf(text));
  }}>
    <Input label="Public key" value={value} set={(v) => { set(v.trim()); setWithout(false); }} required lines={2}
      help={over ? "Let go to take the key." : "Paste it, or drop a file that has it: 64 hex digits, as countersign keygen prints them. Never the identity file itself: the private key stays with the peer."} />
    {without && <State tone="warn">What you dropped has no public key.</State>}
  </div>;
}

function Add({ close, done }: { close: () => void; done: () => void }) {
  const [name, setName] = useState("");
  const [key, setKey] = useState("");
  const good = /^[0-9a-fA-F]{64}$/.test(key);
  return <ActDialog title="Enrol a peer" submit="Propose" can={good && !!name} close={close} done={(p) => { done(); if (p.state === "done") { close(); go(link("peers", name)); } }}
    make={() => ({ act: "peer add", parameters: { name, public_key: key.toLowerCase() } })}>
    <Input label="Name" value={name} set={setName} required maxLength={64} help="Lower-case letters, digits and hyphens, for example shop-1. Policy and the audit log use it." />
    <KeyInput value={key} set={setKey} />
    {key && !good && <State tone="warn">A public key has 64 hex digits; this has {key.length} characters.</State>}
  </ActDialog>;
}

/** Strangers shows refused handshakes: often a peer that nobody has enrolled yet. */
function Strangers() {
  const list = useLoad((signal) => call("GET /v1/handshakes/refused", { signal }), []);
  return <Section title="Refused handshakes" note="Since the start of the daemon. A client is not told why." actions={<button type="button" onClick={list.reload}>Look again</button>}>
    <Load of={list}>{(all) => <Table name="Refused handshakes" rows={all.slice(0, 20)} id={(r) => r.from + (r.key ?? "") + r.reason}
      empty={<Empty title="No handshake was refused.">A client with an unknown key, or a wrong profile, comes here with the reason.</Empty>} columns={[
        { head: "Who", cell: (r) => <>{r.peer ? <a href={link("peers", r.peer)}><Text>{r.peer}</Text></a> : r.key ? <Id of="key">{r.key}</Id> : <span class="quiet">no key seen</span>}{r.unproven && <span class="quiet"> (claims it)</span>}</> },
        { head: "From", cell: (r) => <Text>{r.from}</Text> },
        { head: "Why", cell: (r) => <><Text>{r.text}</Text><br /><span class="quiet"><Text>{r.do}</Text></span></> },
        { head: "Times", num: true, cell: (r) => r.count },
        { head: "Last", cell: (r) => <Time s={r.last} ago /> },
      ]} />}</Load>
  </Section>;
}

export function Peer({ name }: { name: string }) {
  const mine = myRoles();
  const of = useLoad((signal) => call("GET /v1/peers/{name}", { path: { name }, signal }), [name], ["change"]);
  const noise = useLoad((signal) => call("GET /v1/noise-key", { signal }), []);
  const keys = useLoad(async (signal) => [...new Set((await page("GET /v1/keys", { query: { limit: 200 }, signal })).items.filter((k) => k.state === "active" && !k.own).map((k) => k.name))], []);
  const [address, setAddress] = useState(localStorage.getItem("address") ?? "");
  const host = /^[\w.:\[\]-]+$/.test(address) ? address : "HOST:7700";
  const [asking, setAsking] = useState<"" | "remove" | "suspend" | "resume" | "key" | PeerKey>("");
  const p = of.data;
  const actions = p && <>
    {mayPropose(mine, "peer key add") && <button type="button" onClick={() => setAsking("key")}>Add a key…</button>}
    {!p.suspended && may(mine, "POST /v1/peers/{name}/suspend") && <button type="button" onClick={() => setAsking("suspend")}>Suspend…</button>}
    {p.suspended && may(mine, "POST /v1/peers/{name}/resume") && <button type="button" onClick={() => setAsking("resume")}>Resume…</button>}
    {may(mine, "DELETE /v1/peers/{name}") && <button type="button" class="danger" onClick={() => setAsking("remove")}>Remove…</button>}
  </>;
  const close = () => setAsking("");
  return <Page title={<Text>{name}</Text>} back={{ to: "/peers", name: "Peers" }} actions={actions}>
    <Load of={of}>{(p) => <>
      <Section title="The peer">
        <Facts of={[
          ["State", <PeerState peer={p} />],
          ["Last seen", <Time s={p.last_seen} ago />],
          ["Connections", String(p.connections)],
          ["Enrolled", <Time s={p.added} />],
          ["Kept for it today", <>{bytes(p.used_bytes)} <span class="quiet">of its bytes_per_day</span></>],
          ["For its refusals", bytes(p.used_refusal_bytes)],
        ]} />
      </Section>
      <Section title="Keys" note="A peer changes its key by having two for a while.">
        <Table name="Keys of the peer" rows={p.keys} id={(k) => k.public_key} empty={null} columns={[
          { head: "Public key", cell: (k) => <Id of="public key">{k.public_key}</Id> },
          { head: "Added", cell: (k) => <Time s={k.added} /> },
          { head: "Last seen", cell: (k) => <Time s={k.last_seen} ago /> },
          { head: "Connections", num: true, cell: (k) => k.connections },
          ...(may(mine, "DELETE /v1/peers/{name}/keys/{key}") && p.keys.length > 1 ? [{ head: "Take back", cell: (k: PeerKey) => <button type="button" class="danger" onClick={() => setAsking(k)}>Remove…</button> }] : []),
        ]} />
      </Section>
      {may(mine, "GET /v1/peers/{name}/activity") && <Activity name={name} />}
      {may(mine, "GET /v1/peers/{name}/rights") && <Rights name={name} />}
      <Section title="Its client" note={`To copy to the payment server. ${name}.key is its identity file.`}>
        <Input label="Address of this appliance, as the peer reaches it" value={address} set={(to) => { setAddress(to); localStorage.setItem("address", to); }} help="HOST:PORT of listen in the configuration. It is kept in this browser." />
        <Load of={noise}>{(n) => {
          const key = keys.data?.[0] ?? "KEY";
          return <>
            <Command of="client command">{`export COUNTERSIGN_SERVER=${host}
export COUNTERSIGN_SERVER_KEY=${n.public_key}
export COUNTERSIGN_IDENTITY=${name}.key
countersign ping
countersign sign --key ${key} --context test FILE`}</Command>
            <Command of="SDK snippet">{`id, err := client.ReadIdentity("${name}.key")
server, err := client.ParseKey("${n.public_key}")
c, err := client.Dial(ctx, client.Config{
	Address: "${host}", ServerKey: server, Identity: id,
})
signed, err := c.Sign(ctx, "${key}", document)`}</Command>
          </>;
        }}</Load>
      </Section>
      {may(mine, "GET /v1/events") && <Latest name={name} />}
    </>}</Load>
    {asking === "remove" && <Confirm title={`Remove ${name}`} name={name} submit="Remove the peer" close={close}
      what={<>Its enrolment and {plural(p?.keys.length ?? 0, "key")} are taken back, and {plural(p?.connections ?? 0, "connection")} closed. To let it in again takes approval.</>}
      act={async () => { await call("DELETE /v1/peers/{name}", { path: { name } }); go("/peers"); }} />}
    {asking === "suspend" && <Confirm title={`Suspend ${name}`} name={name} submit="Suspend" close={close} what="It is kept out until it is resumed; its connections are closed."
      act={async () => { await call("POST /v1/peers/{name}/suspend", { path: { name } }); of.reload(); close(); }} />}
    {asking === "resume" && <Confirm title={`Resume ${name}`} name={name} submit="Resume" close={close} what="It may connect again, and have signed what policy allows."
      act={async () => { await call("POST /v1/peers/{name}/resume", { path: { name } }); of.reload(); close(); }} />}
    {asking === "key" && p && <AddKey peer={p} close={close} done={of.reload} />}
    {typeof asking === "object" && <Confirm title="Remove a key of the peer" name={name} submit="Remove the key" close={close} what={<>The key {asking.public_key.slice(0, 10)}… is taken back, and its connections are closed.</>}
      act={async () => { await call("DELETE /v1/peers/{name}/keys/{key}", { path: { name, key: asking.public_key } }); of.reload(); close(); }} />}
  </Page>;
}

/** Activity shows what the peer was answered in the last hour. */
function Activity({ name }: { name: string }) {
  const of = useLoad((signal) => call("GET /v1/peers/{name}/activity", { path: { name }, signal }), [name]);
  useEffect(() => { const timer = setInterval(of.reload, 15_000); return () => clearInterval(timer); }, [of.reload]);
  return <Section title="The last hour" note="Answers in each minute, since the start of the daemon. The last minute is not over." actions={<button type="button" onClick={of.reload}>Look again</button>}>
    <Load of={of}>{(a) => <Facts of={([["Signatures", a.signatures], ["Verifications", a.verifications], ["Refused", a.refused], ["Other answers", a.others]] as [string, number[]][]).map(([label, all]) =>
      [label, <span key={label}>{count(all.reduce((n, x) => n + x, 0))} <span class="quiet">· {figure(all[all.length - 2]! / 60, "1/s")} in the last whole minute</span> <Spark label={label + " in each minute of the last hour"} values={all} /></span>])} />}</Load>
  </Section>;
}

/** Rights shows what policy says of the peer: the rules in force that fit it, for each key. */
function Rights({ name }: { name: string }) {
  const of = useLoad((signal) => call("GET /v1/peers/{name}/rights", { path: { name }, signal }), [name], ["change", "rotation"]);
  return <Section title="What policy lets it do" note={<>Asked of the policy in force. <a href="/policy">Policy</a></>}>
    <Load of={of}>{(all) => <Table name="Rights" rows={all.filter((r) => r.rules.some((x) => x.permits))} id={(r) => r.key + r.action} empty={<Empty title="Nothing: no rule fits it."><p>An administrator proposes a rule, for example:</p><p><code>{`permit (principal == Peer::"${name}", action == Action::"sign", resource == Key::"KEY");`}</code></p></Empty>} columns={[
      { head: "Key", cell: (r) => <a href={link("keys", r.key)}><Text>{r.key}</Text></a> },
      { head: "May", cell: (r) => { const permits = r.rules.filter((x) => x.permits), forbids = r.rules.filter((x) => !x.permits); const what = r.action === "sign_raw" ? "raw bytes" : "documents";
        return permits.some((x) => !x.conditional) && !forbids.length ? <State tone="ok">have {what} signed</State> : <State tone="info">have {what} signed, under conditions</State>; } },
      { head: "By", cell: (r) => r.rules.map((x) => <details key={x.id}><summary>{x.permits ? "permit" : "forbid"} in line {x.line}</summary><pre class="text" tabIndex={0}><Text lines>{x.text.trim()}</Text></pre></details>) },
    ]} />}</Load>
  </Section>;
}

function AddKey({ peer, close, done }: { peer: PeerDoc; close: () => void; done: () => void }) {
  const [key, setKey] = useState("");
  return <ActDialog title={`Add a key to ${peer.name}`} can={/^[0-9a-fA-F]{64}$/.test(key)} close={close} done={done}
    make={() => ({ act: "peer key add", parameters: { name: peer.name, enrolled: new Date(peer.added * 1000).toISOString().replace(".000Z", "Z"), public_key: key.toLowerCase() } })}>
    <KeyInput value={key} set={setKey} />
  </ActDialog>;
}

function Latest({ name }: { name: string }) {
  const list = useList((after, signal) => page("GET /v1/events", { query: { actor: name, order: "newest", limit: 15, after }, signal }), [name], ["acknowledgement"]);
  return <Section title="Latest events" note={<a href={"/audit?actor=" + encodeURIComponent(name)}>All in the audit log</a>} actions={<button type="button" onClick={list.reload}>Look again</button>}>
    <Load of={list}>{() => <Table name="Latest events" rows={list.items} id={(e) => e.index} more={list.more} loading={list.loadingMore} empty={<Empty title="It has done nothing yet.">Each signature, verification and refusal of the peer comes here.</Empty>} columns={[
      { head: "Event", cell: (e) => <a href={link("audit", e.index)}>{e.index}</a> },
      { head: "When", cell: (e) => <Time ms={e.time_ms} /> },
      { head: "Type", cell: (e) => <Words>{e.type}</Words> },
      { head: "Resource", cell: (e) => <Text>{e.resource ?? ""}</Text> },
      { head: "Outcome", cell: (e) => <State tone={e.outcome === "ok" ? "ok" : "warn"}><Text>{e.outcome}</Text></State> },
    ]} />}</Load>
  </Section>;
}
