import { call, may, mayPropose, page } from "../api";
import { link } from "../router";
import { myRoles } from "../session";
import { Empty, Facts, Id, Load, Page, Section, State, Table, Text, Time, useList, useLoad } from "../ui";

export function Policy({ version }: { version?: string | undefined }) {
  const mine = myRoles();
  const list = useList((after, signal) => page("GET /v1/policies", { query: { after, limit: 200 }, signal }), [], ["change"]);
  const newest = list.items[list.items.length - 1];
  const shown = version ? Number(version) : newest?.version;
  const text = useLoad(async (signal) => shown === undefined ? undefined : call("GET /v1/policies/{version}", { path: { version: shown }, signal }), [shown]);
  const groups = useList((after, signal) => page("GET /v1/groups", { query: { after, limit: 50 }, signal }), [], ["change"]);
  return <Page title={version ? `Policy, version ${version}` : "Policy"} lead="Who may have what signed. What no rule permits is denied." actions={!version && mayPropose(mine, "policy activate") && <a class="button" href="/policy/edit">Change it…</a>} {...(version ? { back: { to: "/policy", name: "The policy in force" } } : {})}>
    <Section title={version ? "This version" : "In force"}>
      <Load of={text}>{(p) => p && <>
        <Facts of={[["Version", String(p.version)], ["State", p.version === newest?.version ? <State tone="ok">in force</State> : <State tone="off">replaced</State>], ["Since", <Time s={p.activated} />], ["SHA-256", <Id of="SHA-256 of the policy">{p.sha256}</Id>]]} />
        <pre class="text" tabIndex={0} aria-label="Text of the policy"><Text lines>{p.text ?? ""}</Text></pre>
      </>}</Load>
    </Section>
    <Section title="Groups" note="Rules can name a group of peers or of keys.">
      <Load of={groups}>{() => <Table name="Groups" rows={groups.items} id={(g) => g.name} more={groups.more} loading={groups.loadingMore} empty={<Empty title="There is no group.">The command <code>countersign admin group set</code> proposes one.</Empty>} columns={[
        { head: "Group", cell: (g) => <strong><Text>{g.name}</Text></strong> }, { head: "Of", cell: (g) => g.of }, { head: "Members", num: true, cell: (g) => g.size }, { head: "Changed", cell: (g) => <Time s={g.changed} /> },
      ]} />}</Load>
    </Section>
    <Section title="History">
      <Load of={list}>{() => <Table name="Versions of the policy" rows={[...list.items].reverse()} id={(p) => p.version} more={list.more} loading={list.loadingMore} empty={<Empty title="No policy was ever in force." />} columns={[
        { head: "Version", cell: (p) => <a href={link("policy", p.version)}>{p.version}</a> },
        { head: "In force from", cell: (p) => <Time s={p.activated} /> },
        { head: "SHA-256", cell: (p) => <Id of="SHA-256">{p.sha256}</Id> },
      ]} />}</Load>
    </Section>
    {may(mine, "GET /v1/decisions") && <p class="quiet">Why a request was allowed or denied: open its event in the <a href="/audit?type=SignatureAdmitted">audit log</a>.</p>}
  </Page>;
}
