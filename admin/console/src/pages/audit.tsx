import { useEffect, useState } from "preact/hooks";
import { Refused, call, may, page } from "../api";
import type { Event } from "../generated";
import { checkEvent, forgetPin, pin } from "../proof";
import type { Checked } from "../proof";
import { link, route, setQuery } from "../router";
import { myRoles } from "../session";
import { useStore } from "../store";
import { Empty, Facts, Field, Form, Id, Input, Load, Page, Problem, Section, State, Table, Text, Time, Waiting, Words, count, plural, useList, useLoad } from "../ui";
import { eventTypes } from "../generated";

const filters = ["type", "actor", "resource", "nonce", "digest", "request", "since", "until", "outcome"] as const;
type Filters = Record<(typeof filters)[number], string>;

const toMs = (local: string) => local ? new Date(local).getTime() : undefined;

export function Audit() {
  const { query } = useStore(route);
  const f = Object.fromEntries(filters.map((n) => [n, query.get(n) ?? ""])) as Filters;
  const mine = myRoles();
  const q = { type: f.type, actor: f.actor, resource: f.resource, nonce: f.nonce, digest: f.digest, request: f.request, since: toMs(f.since), until: toMs(f.until), outcome: f.outcome };
  const list = useList((after, signal) => page("GET /v1/events", { query: { ...q, order: "newest", limit: 50, after }, signal }), [JSON.stringify(q)]);
  const shown = list.items;
  return <Page title="Audit log" lead="Every use of a key, every refusal, every act of an operator, in the order in which it was written down. The log is a Merkle tree with signed checkpoints." actions={<button type="button" onClick={list.reload}>Newest events</button>}>
    <Section title="Search" note="The address of this page has the search: send it to a colleague.">
      <Search f={f} />
    </Section>
    <Section title="Events" note="The newest first.">
      <Load of={list}>{() => <Table name="Events" rows={shown} id={(e) => e.index} more={list.more} loading={list.loadingMore} columns={columns}
        empty={<Empty title="No event fits.">{Object.values(f).some(Boolean) ? <>Take something out of the search. <a href="/audit">Show all events</a></> : "The first event of a log says that it begins."}</Empty>} />}</Load>
    </Section>
    <Section title="Take it along" note="The log is static files, which anyone can check without the appliance.">
      <Save query={q} disabled={!shown.length} />
      <p class="quiet">Who approved what: <a href="/approvals">Approvals</a>, each with its text, its signatures and what it did; <code>countersign audit approvals DIR</code> checks all of them from an export.</p>
      <p class="quiet">The whole log with its proofs: <code>countersign admin audit export DIR</code>, then <code>countersign audit verify DIR</code>. {may(mine, "GET /v1/report/statement") && <>A statement of a period: <code>countersign admin audit report DIR</code>.</>}</p>
      <Pinned />
    </Section>
  </Page>;
}

const columns = [
  { head: "Event", cell: (e: Event) => <a href={link("audit", e.index)}>{e.index}</a> },
  { head: "When", cell: (e: Event) => <Time ms={e.time_ms} /> },
  { head: "Type", cell: (e: Event) => <Words>{e.type}</Words> },
  { head: "Who", cell: (e: Event) => <><span class="words"><Text>{e.actor.name}</Text></span> <span class="quiet">{e.actor.kind}</span></> },
  { head: "Resource", cell: (e: Event) => <Resource of={e.resource ?? ""} /> },
  { head: "Outcome", cell: (e: Event) => <State tone={e.outcome === "ok" ? "ok" : "warn"}><Text>{e.outcome}</Text></State> },
];

/** Resource shows what an event is about, the long id of a session in short. */
function Resource({ of }: { of: string }) {
  const m = /^(session\/)([0-9a-f]{32,})$/.exec(of);
  return m ? <>{m[1]}<Id of="session">{m[2]!}</Id></> : <Text>{of}</Text>;
}

function Search({ f }: { f: Filters }) {
  const [v, setV] = useState(f);
  useEffect(() => setV(f), [JSON.stringify(f)]);
  const set = (n: keyof Filters) => (to: string) => setV({ ...v, [n]: to });
  return <form class="row" role="search" onSubmit={(e) => { e.preventDefault(); setQuery(v); }}>
    <Field label="Type">{(id) => <><input id={id} list={id + "-types"} value={v.type} onInput={(e) => set("type")(e.currentTarget.value)} onChange={(e) => setQuery({ ...v, type: e.currentTarget.value })} />
      <datalist id={id + "-types"}>{eventTypes.map((t) => <option value={t} key={t} />)}</datalist></>}</Field>
    <Input label="Actor" value={v.actor} set={set("actor")} />
    <Input label="Resource" value={v.resource} set={set("resource")} placeholder="payments/2" />
    <Field label="Outcome">{(id) => <select id={id} value={v.outcome} onChange={(e) => setQuery({ ...v, outcome: e.currentTarget.value })}><option value="">all</option><option value="ok">ok</option><option value="!ok">all but ok</option></select>}</Field>
    <Input label="From" type="datetime-local" value={v.since} set={set("since")} />
    <Input label="Until" type="datetime-local" value={v.until} set={set("until")} />
    <Input label="Nonce or request" value={v.nonce || v.digest || v.request} set={(to) => setV({ ...v, nonce: /^[0-9a-f]{64}$/.test(to) ? to : "", digest: "", request: /^[0-9a-f]{64}$/.test(to) ? "" : to })} />
    <button class="primary">Search</button>
  </form>;
}

/** most is the number of events that a browser keeps for a file. The command has no such bound. */
const most = 200_000;

/** Save fetches all events of a search, and gives them as a file of JSON lines, the oldest first. */
function Save({ query, disabled }: { query: Record<string, string | number | undefined>; disabled: boolean }) {
  const [n, setN] = useState(0);
  const [stop, setStop] = useState<AbortController | null>(null);
  const [ended, setEnded] = useState("");
  const [error, setError] = useState<unknown>();
  useEffect(() => () => stop?.abort(), [stop]);
  const save = async () => {
    const control = new AbortController();
    setStop(control);
    setError(undefined);
    setEnded("");
    try {
      const parts: string[] = [];
      let after = "", all = 0, first = -1, last = -1;
      do {
        const got = await page("GET /v1/events", { query: { ...query, order: "oldest", limit: 1000, after }, signal: control.signal });
        for (const e of got.items) {
          if (first < 0) first = e.index;
          last = e.index;
          parts.push(JSON.stringify(e), "\n");
        }
        setN(all += got.items.length);
        after = got.next;
      } while (after && all < most);
      const a = document.createElement("a");
      a.href = URL.createObjectURL(new Blob(parts, { type: "application/jsonl" }));
      a.download = `events-${first}-${last}.jsonl`;
      a.click();
      setTimeout(() => URL.revokeObjectURL(a.href), 60_000);
      setEnded(`${plural(all, "event")} saved as ${a.download}${after ? "; there are more: take a shorter time, or the command" : ""}.`);
    } catch (e) { if (!(e instanceof Refused && e.code === "cancelled")) setError(e); }
    setStop(null);
  };
  return <>
    {stop ? <p><Waiting of={`${plural(n, "event")} fetched`} /> <button type="button" onClick={() => { stop.abort(); setStop(null); }}>Stop</button></p>
      : <p><button type="button" disabled={disabled} onClick={() => void save()}>Save all events of this search (JSON lines)</button></p>}
    {ended && <p class="notice ok" role="status"><State tone="ok">{ended}</State></p>}
    {error !== undefined && <Problem error={error} />}
  </>;
}

function Pinned() {
  const [p, setP] = useState(pin());
  if (!p) return <p class="quiet">This browser has not seen the log yet. It pins the log’s key at the first proof that it checks.</p>;
  const newest = Object.entries(p.epochs).sort(([a], [b]) => Number(b) - Number(a))[0];
  return <details><summary>What this browser has pinned</summary>
    <Facts of={[["Log", <Id of="log name" whole>{p.name}</Id>], ["Key", <Id of="log key">{p.key}</Id>], newest && ["Newest checkpoint", <>{count(newest[1].size)} events of epoch {newest[0]}, <Time ms={newest[1].at} /></>]]} />
    <Form submit="Forget it" danger act={async () => { forgetPin(); setP(null); }}><p class="help">Only after the appliance was replaced on purpose: a log that was rewritten would go unseen.</p></Form>
  </details>;
}

export function AuditEvent({ index }: { index: number }) {
  const of = useLoad(async (signal) => {
    const { items } = await page("GET /v1/events", { query: { from: index, before: index + 1, limit: 1 }, signal });
    if (!items[0]) throw new Refused("not_found", "It does not exist", `Event ${index} is not in the log: it was not written yet, or retention has dropped it.`);
    return items[0];
  }, [index]);
  return <Page title={<>Event {index}{of.data && <>: {of.data.type}</>}</>} back={{ to: "/audit", name: "Audit log" }} actions={<>
    {index > 0 && <a class="button" href={link("audit", index - 1)}>← {index - 1}</a>}<a class="button" href={link("audit", index + 1)}>{index + 1} →</a></>}>
    <Load of={of}>{(e) => <>
      <Section title="The event">
        <Facts of={[
          ["Type", e.type], ["When", <Time ms={e.time_ms} />],
          ["Who", <>{e.actor.kind === "peer" ? <a href={link("peers", e.actor.name)}><Text>{e.actor.name}</Text></a> : <Text>{e.actor.name}</Text>} <span class="quiet">{e.actor.kind}</span></>],
          ["Action", <Text>{e.action}</Text>],
          !!e.resource && ["Resource", <Text>{e.resource}</Text>],
          ["Outcome", <State tone={e.outcome === "ok" ? "ok" : "warn"}><Text>{e.outcome}</Text></State>],
          !!e.actor.request && ["Request", <a href={"/audit?request=" + encodeURIComponent(e.actor.request)}><Text>{e.actor.request}</Text></a>],
          !!e.actor.proposal && ["Approved by", <a href={link("approvals", e.actor.proposal)}>proposal {e.actor.proposal}</a>],
          !!e.actor.public_key && ["Key of the session", <Id of="public key">{e.actor.public_key}</Id>],
          ...Object.entries(e.metadata ?? {}).map(([n, v]): [string, preact.ComponentChildren] => [n.replaceAll("_", " "), /^[0-9a-f]{40,}$/.test(v) ? <Id of={n}>{v}</Id> : /(_at|^since|^until)$/.test(n) && /^\d{10}(\d{3})?$/.test(v) ? <Time ms={Number(v.padEnd(13, "0"))} /> : v.includes("\n") ? <pre class="text" tabIndex={0}><Text lines>{v}</Text></pre> : <Text>{v}</Text>]),
        ]} />
      </Section>
      <Proof event={e} />
    </>}</Load>
  </Page>;
}

/** Proof checks in this browser that the event is in the log. */
function Proof({ event }: { event: Event }) {
  const mine = myRoles();
  const [checked, setChecked] = useState<Checked | null>(null);
  const [error, setError] = useState<unknown>();
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    const stop = new AbortController();
    setChecked(null);
    setError(undefined);
    void (async () => {
      try {
        const log = may(mine, "GET /v1/log") ? await call("GET /v1/log", { signal: stop.signal }) : undefined;
        const c = await checkEvent(event.index, log?.verifier_key, event, stop.signal);
        if (!stop.signal.aborted) setChecked(c);
      } catch (e) { if (!stop.signal.aborted) setError(e); }
    })();
    return () => stop.abort();
  }, [event.index, turn]);
  return <Section title="Proof" note="Computed in this browser, from the leaf to the signed root. The appliance is not asked whether it is right." actions={<button type="button" onClick={() => setTurn(turn + 1)}>Check again</button>}>
    {error instanceof Refused && error.code === "conflict" ? <Alarm detail={error.detail} /> : error !== undefined && <Problem error={error} again={() => setTurn(turn + 1)} />}
    {!checked && error === undefined && <Waiting of="Checking" />}
    {checked?.rewritten && <Alarm detail={checked.steps.find((s) => !s.ok)?.detail ?? ""} />}
    {checked && <>
      <p class={"notice " + (checked.ok ? "ok" : "crit")} role="status" data-proof={checked.ok ? "holds" : "fails"}>
        <State tone={checked.ok ? "ok" : "crit"}><strong>{checked.ok ? "Proven: this event is in the log, and the log continues the one this browser knows." : "Not proven: do not rely on what this page shows."}</strong></State>
      </p>
      <ol class="todo">{checked.steps.map((s) => <li key={s.what}><State tone={s.ok ? "ok" : "crit"}><span class="unseen">{s.ok ? "holds" : "fails"}</span></State><div>{s.what}<div class="quiet"><Text>{s.detail}</Text></div></div></li>)}</ol>
      <details><summary>The bytes of the leaf, and the root</summary>
        <pre class="text" tabIndex={0}><Text lines>{checked.leaf}</Text></pre>
        <Facts of={[["Tree", count(checked.size) + " leaves"], !!checked.root && ["Root", <Id of="root">{checked.root}</Id>]]} />
      </details>
    </>}
  </Section>;
}

function Alarm({ detail }: { detail: string }) {
  return <div class="problem" role="alert" data-proof="rewritten">
    <State tone="crit"><strong>The log is not the one that this browser saw before.</strong></State>
    <p><Text>{detail}</Text></p>
    <p>Either somebody has rewritten the log, or an older ledger was put back. Do not sign or approve anything. Keep this browser’s data as evidence, and follow docs/INCIDENTS.md. Compare with an exported copy: <code>countersign audit verify DIR</code>.</p>
  </div>;
}
