import { useEffect, useRef, useState } from "preact/hooks";
import { ActDialog } from "../act";
import { call, may, page } from "../api";
import type { Editor } from "../editor";
import type { PolicyRule, TriedPolicy } from "../generated";
import { go, link } from "../router";
import { myRoles } from "../session";
import { Empty, Id, Input, Load, Page, Problem, Section, Select, State, Table, Text, Time, Waiting, count, plural, useLoad } from "../ui";

const draftKey = "policy-draft", casesKey = "policy-cases";

/** exampleCases are two cases with a peer and a key that exist. */
async function exampleCases(signal: AbortSignal): Promise<string> {
  const [peers, keys] = await Promise.all([page("GET /v1/peers", { query: { limit: 1 }, signal }), page("GET /v1/keys", { query: { limit: 50 }, signal })]);
  const peer = peers.items[0]?.name ?? "shop", key = keys.items.find((k) => !k.own)?.name ?? "payments";
  return `name,expect,peer,key\n${peer} may sign,allow,${peer},${key}\na stranger may not,deny,stranger,${key}\n`;
}

export function PolicyEdit() {
  const now = useLoad(async (signal) => {
    const versions = await page("GET /v1/policies", { signal });
    const newest = versions.items[versions.items.length - 1];
    const [policy, cases] = await Promise.all([
      newest ? call("GET /v1/policies/{version}", { path: { version: newest.version }, signal }) : undefined, exampleCases(signal),
    ]);
    return { policy, cases };
  }, []);
  return <Page title="Change the policy" back={{ to: "/policy", name: "The policy in force" }} lead="Nothing is in force before approvers have signed. What you write is kept in this tab.">
    <Load of={now}>{({ policy: p, cases }) => <Bench base={p?.text ?? ""} version={p?.version ?? 0} example={cases} />}</Load>
  </Page>;
}

function Bench({ base, version, example }: { base: string; version: number; example: string }) {
  const mine = myRoles();
  const [text, setText] = useState(() => sessionStorage.getItem(draftKey) ?? base);
  const [cases, setCases] = useState(() => sessionStorage.getItem(casesKey) ?? example);
  const [tried, setTried] = useState<TriedPolicy | null>(null);
  const [error, setError] = useState<unknown>();
  const [days, setDays] = useState("0");
  const [busy, setBusy] = useState(false);
  const [proposing, setProposing] = useState(false);
  const box = useRef<HTMLDivElement>(null);
  const editor = useRef<Editor | null>(null);
  const [loaded, setLoaded] = useState(false);
  useEffect(() => {
    let over = false;
    void import("../editor").then(({ edit }) => {
      if (over) return;
      editor.current = edit(box.current!, text, (t) => { setText(t); sessionStorage.setItem(draftKey, t); });
      setLoaded(true);
    }, setError);
    return () => { over = true; editor.current?.end(); };
  }, []);
  // The text is tried a moment after the last key.
  useEffect(() => {
    const stop = new AbortController();
    const timer = setTimeout(() => {
      setBusy(true);
      call("POST /v1/policies/try", {
        body: { text, cases, ...(days === "0" ? {} : { since: Date.now() - Number(days) * 86_400_000 }) }, signal: stop.signal,
      }).then((t) => {
        if (stop.signal.aborted) return;
        setTried(t);
        setError(undefined);
        setBusy(false);
        editor.current?.marks([...(t.error ? [{ line: t.error.line, grave: true }] : []), ...t.warnings.map((w) => ({ line: w.line, grave: false }))]);
      }, (e) => { if (!stop.signal.aborted) { setError(e); setBusy(false); } });
    }, 250);
    return () => { clearTimeout(timer); stop.abort(); };
  }, [text, cases, days, loaded]);
  const wrong = tried?.cases.filter((c) => c.expect !== c.got) ?? [];
  const same = text === base;
  return <>
    <Section title="Text" note={<>Cedar. {busy ? "Checking…" : "Checked as you type."}</>} actions={<>
      <button type="button" disabled={same} onClick={() => { sessionStorage.removeItem(draftKey); location.reload(); }}>Back to version {version}</button></>}>
      {!loaded && <Waiting of="Loading the editor" />}
      <div ref={box} class="editor" />
      {error !== undefined && <Problem error={error} />}
      <div role="status" aria-live="polite">{tried?.error ? <div class="notice crit"><State tone="crit">{tried.error.line ? <><button type="button" class="link" onClick={() => editor.current?.goTo(tried.error!.line)}>Line {tried.error.line}</button>: </> : ""}<Text>{tried.error.text}</Text></State></div>
        : tried && <p><State tone="ok">{plural(tried.rules, "rule")}, sound.</State> <span class="quiet">Verifications: {tried.verifies ? "by these rules" : "for every peer, since no rule names them"}.</span></p>}</div>
      {tried?.warnings.map((w) => <div class="notice warn" key={w.line + w.text}><State tone="warn"><button type="button" class="link" onClick={() => editor.current?.goTo(w.line)}>Line {w.line}</button>: <Text>{w.text}</Text></State></div>)}
    </Section>
    <Section title="Cases" note="Requests and what they must get. The table is run at each change.">
      <Input label="Table (CSV)" lines={5} value={cases} set={(t) => { setCases(t); sessionStorage.setItem(casesKey, t); }} help="Columns: expect, peer, key; optional name, action, groups, time, and each field of the context. docs/SPEC.md has the list." />
      {tried?.trouble && <div class="notice crit"><State tone="crit">{tried.trouble.line ? `Line ${tried.trouble.line}: ` : ""}<Text>{tried.trouble.text}</Text></State></div>}
      {tried && !tried.error && <Table name="Cases" rows={tried.cases} id={(c) => c.line} empty={<Empty title="There is no case." />} columns={[
        { head: "Case", cell: (c) => <Text>{c.name || "line " + c.line}</Text> },
        { head: "Result", cell: (c) => <State tone={c.expect === c.got ? "ok" : "crit"}>{c.expect === c.got ? "as expected" : "WRONG"}</State> },
        { head: "Must be", cell: (c) => c.expect },
        { head: "Is", cell: (c) => c.got },
        { head: "By", cell: (c) => <Text>{c.fault || c.rules.join(", ") || "no rule permits it"}</Text> },
      ]} />}
    </Section>
    {tried && !tried.error && <Section title="What changes" note={`Against version ${version}, which is in force.`}>
      <p class="says"><strong>{told(tried, same)}</strong></p>
      <RuleList title="Added" tone="ok" sign="+" rules={tried.changed?.added ?? []} />
      <RuleList title="Removed" tone="crit" sign="−" rules={tried.changed?.removed ?? []} />
      {may(mine, "GET /v1/decisions/{event}") && <Select label="Replay the decisions of" value={days} set={setDays} options={[["0", "no time"], ["1", "the last day"], ["7", "the last 7 days"], ["30", "the last 30 days"], ["90", "the last 90 days"]]} />}
      {tried.replay && <Table name="Decisions that would change" rows={tried.replay.changes} id={(c) => c.event} empty={<Empty title="No decision would be another one.">{plural(tried.replay.decisions, "decision")} {tried.replay.decisions === 1 ? "was" : "were"} replayed.</Empty>} columns={[
        { head: "Event", cell: (c) => <a href={link("audit", c.event)}>{c.event}</a> },
        { head: "When", cell: (c) => <Time ms={c.time_ms} /> },
        { head: "Peer", cell: (c) => <Text>{c.peer}</Text> },
        { head: "Key", cell: (c) => <Text>{c.key}</Text> },
        { head: "Was", cell: (c) => c.was },
        { head: "Would be", cell: (c) => <State tone={c.is === "allow" ? "warn" : "crit"}>{c.is === "allow" ? "allowed" : "denied"}</State> },
      ]} />}
      {tried.replay?.partial && <p class="notice warn"><State tone="warn">There are more decisions than were replayed: for all, countersign policy diff.</State></p>}
    </Section>}
    <Section title="Propose">
      {same ? <p class="quiet">The text is the one in force.</p> : <>
        <p>SHA-256 <Id of="SHA-256 of the text">{tried?.sha256 ?? ""}</Id></p>
        {wrong.length > 0 && <p class="notice warn"><State tone="warn">{plural(wrong.length, "case")} {wrong.length === 1 ? "is" : "are"} wrong. Approvers do not see your cases.</State></p>}
        <p><button type="button" class="primary" disabled={!tried || !!tried.error || busy} onClick={() => setProposing(true)}>Propose…</button></p>
      </>}
    </Section>
    {proposing && <ActDialog title="Put a policy in force" close={() => setProposing(false)} make={() => ({ act: "policy activate", parameters: {}, content: text })}
      done={(p) => { if (p.state === "done") { sessionStorage.removeItem(draftKey); setProposing(false); go("/policy"); } }}>
      <p>{tried && told(tried, same)}</p>
    </ActDialog>}
  </>;
}

/** told says in a sentence what a text changes. */
function told(t: TriedPolicy, same: boolean): string {
  if (same) return "Nothing changes.";
  const { added, removed, kept } = t.changed ?? { added: [], removed: [], kept: 0 };
  const parts = [
    added.length && `adds ${plural(added.length, "rule")} (${kinds(added)})`,
    removed.length && `removes ${plural(removed.length, "rule")} (${kinds(removed)})`,
  ].filter(Boolean);
  let out = parts.length ? `It ${parts.join(" and ")}; ${kept} stay.` : "The rules are the same; only notes or spaces differ.";
  if (t.replay) {
    const denied = t.replay.changes.filter((c) => c.is === "deny").length, allowed = t.replay.changes.length - denied;
    out += t.replay.changed ? ` Of ${plural(t.replay.decisions, "past decision")}, ${count(t.replay.changed)} would be another one: ${denied} allowed ones denied, ${allowed} denied ones allowed${t.replay.changed > t.replay.changes.length ? " among those shown" : ""}.`
      : ` None of ${plural(t.replay.decisions, "past decision")} would be another one.`;
  }
  return out;
}

function kinds(rules: PolicyRule[]): string {
  const permits = rules.filter((r) => r.permits).length, forbids = rules.length - permits;
  return [permits && plural(permits, "permit"), forbids && plural(forbids, "forbid")].filter(Boolean).join(", ");
}

function RuleList({ title, tone, sign, rules }: { title: string; tone: "ok" | "crit"; sign: string; rules: PolicyRule[] }) {
  if (!rules.length) return null;
  return <div><h3>{title}</h3>{rules.slice(0, 20).map((r) => <pre class={"text diff " + tone} key={r.id + r.text} tabIndex={0} aria-label={`${title}: line ${r.line}`}><Text lines>{r.text.trim().split("\n").map((l) => sign + " " + l).join("\n")}</Text></pre>)}
    {rules.length > 20 && <p class="help">and {rules.length - 20} more</p>}</div>;
}
