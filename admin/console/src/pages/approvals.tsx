import { useState } from "preact/hooks";
import { Signing } from "../act";
import { call, may, mayPropose, page } from "../api";
import type { Proposal } from "../generated";
import { link } from "../router";
import { myRoles, session } from "../session";
import { Empty, Facts, Form, Id, Load, Page, Section, State, Table, Text, Time, Words, useList, useLoad } from "../ui";
import { proposalTone } from "../words";

const counting = (p: Proposal) => p.approvals.filter((a) => a.counts).length;

/** about tells what a proposal is about in a few words. */
const about = (p: Proposal) => p.parameters.filter((x) => ["name", "key", "version", "needed", "roles", "epoch"].includes(x.name)).map((x) => x.value).join(" ");

export function Approvals() {
  const mine = myRoles();
  const s = session.get();
  const me = s.is === "in" ? s.me.operator.name : "";
  const list = useList((after, signal) => page("GET /v1/proposals", { query: { after, limit: 50 }, signal }), [], ["proposal"]);
  const rules = useLoad((signal) => call("GET /v1/approvals", { signal }), [], ["change", "proposal"]);
  const open = list.items.filter((p) => p.state === "open" || p.state === "running");
  const waits = open.filter((p) => mine.includes("approver") && !p.approvals.some((a) => a.operator === me));
  const others = open.filter((p) => !waits.includes(p));
  const columns = [
    { head: "Proposal", cell: (p: Proposal) => <a href={link("approvals", p.id)}>{p.id}</a> },
    { head: "Act", cell: (p: Proposal) => <><strong>{p.act}</strong> <Text>{about(p)}</Text></> },
    { head: "State", cell: (p: Proposal) => <State tone={proposalTone[p.state] ?? "info"}>{p.state}</State> },
    { head: "Signed", num: true, cell: (p: Proposal) => p.state === "open" ? `${counting(p)} of ${p.required}` : counting(p) },
    { head: "By", quiet: true, cell: (p: Proposal) => <Text>{p.proposer}</Text> },
    { head: "When", cell: (p: Proposal) => <Time s={p.ended || p.proposed} ago /> },
  ];
  const id = (p: Proposal) => p.id;
  return <Page title="Approvals" lead="Acts that destroy or widen wait here until enough approvers have signed the exact text.">
    {mine.includes("approver") && <Section title="Waits for you">
      <Load of={list}>{() => <Table name="Proposals that wait for you" rows={waits} id={id} columns={columns} empty={<Empty title="Nothing waits for you.">A proposal comes here as soon as somebody makes one.</Empty>} />}</Load>
    </Section>}
    {(others.length > 0 || !mine.includes("approver")) && <Section title="Waits for others">
      <Table name="Proposals that wait for others" rows={others} id={id} columns={columns} empty={<Empty title="Nothing waits." />} />
    </Section>}
    <Section title="Rule">
      <Load of={rules}>{(r) => <>
        <Facts of={[
          ["Approvals an act needs", String(r.needed)],
          ["Approvers", <Text>{r.approvers.join(", ") || "nobody"}</Text>],
          ["Can it be reached?", r.approvers.length < r.needed ? <State tone="crit">no: {r.approvers.length} of {r.needed} approvers exist</State> : r.approvers.length === r.needed ? <State tone="warn">yes, if nobody is missing</State> : <State tone="ok">yes, also without {r.approvers.length - r.needed}</State>],
          ["Keys", r.hardware ? "passkeys, or FIDO keys with user verification, only" : "passkeys and SSH keys"],
        ]} />
        {r.warning && <p class="notice warn"><State tone="warn"><Text>{r.warning}</Text></State></p>}
      </>}</Load>
    </Section>
    <Section title="History" note="The newest first.">
      <Load of={list}>{() => <Table name="Past proposals" rows={list.items.filter((p) => !open.includes(p))} id={id} columns={columns} more={list.more} loading={list.loadingMore} empty={<Empty title="No proposal has ended yet." />} />}</Load>
    </Section>
  </Page>;
}

export function Approval({ id }: { id: number }) {
  const mine = myRoles();
  const of = useLoad((signal) => call("GET /v1/proposals/{id}", { path: { id }, signal }), [id], ["proposal"]);
  const [fresh, setFresh] = useState<Proposal | null>(null);
  const p = fresh ?? of.data;
  const ended = p && p.state !== "open" && p.state !== "running";
  return <Page title={p ? <>Proposal {id}: {p.act}</> : `Proposal ${id}`} back={{ to: "/approvals", name: "Approvals" }}>
    <Load of={of}>{(loaded) => {
      const p = fresh && fresh.approvals.length >= loaded.approvals.length && loaded.state === "open" ? fresh : loaded;
      return <>
        <Section title="The act">
          <Facts of={[
            ["Act", <strong>{p.act}</strong>],
            ...p.parameters.map((x): [string, preact.ComponentChildren] => [x.name.replaceAll("_", " "), x.value.length > 40 && /^[0-9a-f]+$/.test(x.value) ? <Id of={x.name}>{x.value}</Id> : <Text>{x.value}</Text>]),
            ["Proposed by", <><Text>{p.proposer}</Text>, <Time s={p.proposed} /></>],
            p.state === "open" ? ["Expires", <Time s={p.expires} ago />] : ["Ended", <Time s={p.ended} none="not yet" />],
          ]} />
          {p.content && <details><summary>Its content</summary><pre class="text" tabIndex={0}><Text lines>{p.content}</Text></pre></details>}
        </Section>
        <Section title="Signatures" note={p.state === "open" ? `${counting(p)} of ${p.required}` : ""}>
          <Table name="Signatures" rows={p.approvals} id={(a) => a.operator + a.credential} empty={<Empty title="Nobody has signed yet." />} columns={[
            { head: "Approver", cell: (a) => <Text>{a.operator}</Text> },
            { head: "When", cell: (a) => <Time s={a.at} /> },
            { head: "With", quiet: true, cell: (a) => <Id of="credential">{a.credential}</Id> },
            { head: "Counts", cell: (a) => a.counts ? <State tone="ok">yes</State> : <State tone="off">no longer</State> },
          ]} />
        </Section>
        <Section title={ended ? "What came of it" : "Sign"}>
          <Signing proposal={p} onChange={(next) => { setFresh(next); of.reload(); }} />
          {ended && <><h3>What was signed</h3><pre class="text" tabIndex={0} aria-label="The text that was signed"><Text lines>{p.text}</Text></pre></>}
          {p.state === "open" && may(mine, "POST /v1/proposals/{id}/withdraw") && mayPropose(mine, p.act) &&
            <Form submit="Withdraw the proposal" act={async () => { await call("POST /v1/proposals/{id}/withdraw", { path: { id } }); of.reload(); }} />}
          {ended && may(mine, "GET /v1/events") && <Did proposal={p} />}
        </Section>
      </>;
    }}</Load>
  </Page>;
}


/** Did shows the events of a proposal, and what its act did: the events in its name before its end. */
function Did({ proposal: p }: { proposal: Proposal }) {
  const events = useLoad(async (signal) => {
    const own = (await page("GET /v1/events", { query: { resource: "proposal/" + p.id, order: "newest", limit: 20 }, signal })).items;
    const end = own[0]?.index ?? 0, approved = own[1]?.index ?? end;
    const between = end - approved > 1 ? (await page("GET /v1/events", { query: { from: approved + 1, before: end, limit: 1000 }, signal })).items : [];
    return [...own, ...between.filter((e) => e.actor.proposal === p.id)].sort((a, b) => b.index - a.index);
  }, [p.id, p.state]);
  return <Load of={events}>{(all) => <Table name="Events of the proposal" rows={all} id={(e) => e.index} empty={null} columns={[
    { head: "Event", cell: (e) => <a href={link("audit", e.index)}>{e.index}</a> },
    { head: "When", cell: (e) => <Time ms={e.time_ms} /> },
    { head: "Type", cell: (e) => <Words>{e.type}</Words> },
    { head: "Resource", cell: (e) => <Text>{e.resource ?? ""}</Text> },
    { head: "Who", cell: (e) => <Text>{e.actor.name}</Text> },
    { head: "Outcome", cell: (e) => <Text>{e.outcome}</Text> },
  ]} />}</Load>;
}
