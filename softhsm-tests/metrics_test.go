package softhsmtests

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"countersign/internal/meter"
	"countersign/internal/scantest"
)

func needPrometheus(t *testing.T) {
	t.Helper()
	needTool(t, "prometheus", "prometheus")
	needTool(t, "promtool", "prometheus")
}

func get(t testing.TB, url string) (string, error) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s %.300s", url, resp.Status, b)
	}
	scantest.Saw(url, string(b))
	return string(b), err
}

// prometheus is a running Prometheus with the rules of monitoring/.
type prometheus struct {
	t       testing.TB
	address string
}

// sample is a sample of the answer to a query.
type sample struct {
	Metric map[string]string
	Value  [2]any // the time, and the value as text
}

// scrapedBy starts a Prometheus that scrapes a daemon and evaluates the rules, both each second.
// fields are further fields of the scrape configuration, a line each.
func (s *system) scrapedBy(address, daemon string, fields ...string) *prometheus {
	s.t.Helper()
	more := ""
	for _, f := range fields {
		more += "  " + f + "\n"
	}
	s.write("rules.yml", string(must(os.ReadFile("../monitoring/rules.yml"))(s.t)))
	s.write("prometheus.yml", "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"+
		"rule_files: [rules.yml]\nscrape_configs:\n- job_name: countersign\n"+more+
		"  static_configs: [{targets: [\""+daemon+"\"]}]\n")
	cmd := exec.Command("prometheus", "--config.file="+s.path("prometheus.yml"),
		"--storage.tsdb.path="+s.path("tsdb"), "--web.listen-address="+address, "--log.level=error")
	var said strings.Builder
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if s.t.Failed() {
			s.t.Logf("Prometheus has said:\n%s", tail(said.String(), 3000))
		}
	})
	return &prometheus{s.t, address}
}

// query returns the samples of an expression, or none without an answer.
func (p *prometheus) query(expr string) []sample {
	p.t.Helper()
	var answer struct{ Data struct{ Result []sample } }
	body, err := get(p.t, "http://"+p.address+"/api/v1/query?query="+url.QueryEscape(expr))
	if err != nil || json.Unmarshal([]byte(body), &answer) != nil {
		return nil
	}
	return answer.Data.Result
}

// TestMetrics has a peer use a daemon, and Prometheus scrape the daemon: every series of the table
// is there, every query of the dashboard and of the rules gives data, and no series has a name that
// a peer has.
func TestMetrics(t *testing.T) {
	needPrometheus(t)
	s := newSystem(t)
	address, prometheus := newFolder(t).listen, newFolder(t).listen
	s.edit("countersign.toml", "admin_socket", "metrics_listen = \""+address+"\"\nadmin_socket")
	s.write("countersign.toml", string(must(os.ReadFile(s.path("countersign.toml")))(t))+
		"[[sinks]]\nname = \"siem\"\nfile = \"events.jsonl\"\n")
	s.backedUp()
	s.edit("countersign.toml", "lists = false", "lists = true")
	s.mirrored()
	p := s.serve()
	s.enrol()
	s.holds()
	s.must("admin", "key", "create", "vault", "--recoverable")
	s.newBackup()
	drill := s.ceremony("drill", "--holders", "--identity", s.path("recovery.key"), "--scratch", t.TempDir())
	drill.give("alice")
	drill.give("bob")
	if out, exit := drill.end(); exit != 0 {
		t.Fatalf("drill: %d\n%s", exit, out)
	}
	db := s.scrapedBy(prometheus, address)
	query := func(expr string) int { return len(db.query(expr)) }
	// A rate needs a scrape before the requests.
	eventually(t, "a first scrape", func() bool { return query(`up{job="countersign"} == 1`) == 1 })
	for range 24 {
		c := s.dial()
		doc := message("aaaa")
		signed := must(c.Sign(t.Context(), "payments", doc))(t)
		must(c.Verify(t.Context(), "payments", signed))(t)
		c.Verify(t.Context(), "payments", signed) // a replay
		c.Close()
	}

	body := must(get(t, "http://"+address+"/metrics"))(t)
	for _, each := range meter.All {
		if !strings.Contains(body, "# TYPE "+each.Name+" "+string(each.Kind)+"\n") {
			t.Errorf("%s is not served", each.Name)
		}
	}
	for _, has := range []string{
		`countersign_requests_total{op="sign",result="ok"} 24`, `countersign_replays_total{op="verify"} 24`,
		`countersign_handshakes_total{result="done"} 24`, `countersign_worker_up{token="main",worker="1"} 1`,
		`countersign_stage_seconds_count{stage="device"} 24`,
		`countersign_handshake_seconds_count{result="done"} 24`, `countersign_history_failing 0`,
		`countersign_alerts_firing{code="replays",level="critical"} 1`,
		`countersign_stage_seconds_count{stage="turn"} 24`,
	} {
		eventually(t, "the line "+has, func() bool { // a collection may be a second old
			body = must(get(t, "http://"+address+"/metrics"))(t)
			return strings.Contains(body, "\n"+has+"\n")
		})
	}
	if regexp.MustCompile(`[0-9a-f]{64}|demo|payments`).MatchString(body) {
		t.Error("a key or the name of a peer or key is in the metrics")
	}
	check := exec.Command("promtool", "check", "metrics")
	check.Stdin = strings.NewReader(body)
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}

	for _, expr := range queries(t, prometheus, "../monitoring/dashboard.json") {
		eventually(t, "data of "+expr, func() bool { return query(expr) > 0 })
	}
	out := s.must("admin", "metrics", "requests_total")
	if !strings.Contains(out, `op="sign",result="ok"`) || strings.Contains(out, "countersign_") {
		t.Errorf("admin metrics: %s", out)
	}
	raw := s.must("admin", "metrics", "--raw")
	if !strings.Contains(raw, "\n# TYPE countersign_requests_total counter\n") {
		t.Errorf("admin metrics --raw: %.300s", raw)
	}
	p.stop()
}

// TestScrapeOverHTTPS has a real Prometheus scrape the admin API over HTTPS, with the token of a
// scraper and the pinned CA, over a restart of the daemon, which ends all sessions. With another CA
// there is no scrape, and the removal of the scraper ends the scrapes.
func TestScrapeOverHTTPS(t *testing.T) {
	needPrometheus(t)
	s := newSystem(t)
	host := strings.TrimPrefix(s.configureHTTPS(), "https://")
	web, other := newFolder(t).listen, newFolder(t)
	p := s.serve()
	s.write("ca.pem", must(s.admin().TLS(t.Context()))(t).CA)
	s.otherCA("other.key", "other.pem")
	s.must("admin", "scraper", "add", "prometheus", s.path("scrape.token"))
	token := must(os.ReadFile(s.path("scrape.token")))(t)
	scantest.Secret("the token of a scraper", bytes.TrimSpace(token))
	fields := func(ca string) []string {
		return []string{
			"scheme: https", "metrics_path: /v1/metrics", "tls_config: {ca_file: " + s.path(ca) + "}",
			"authorization: {credentials_file: " + s.path("scrape.token") + "}",
		}
	}
	db := s.scrapedBy(web, host, fields("ca.pem")...)
	up := func(db *prometheus, value string) func() bool {
		return func() bool {
			return len(db.query(`up{job="countersign"} == `+value)) == 1
		}
	}
	eventually(t, "a scrape", up(db, "1"))
	eventually(t, "data", func() bool { return len(db.query(`countersign_token_up{token="main"} == 1`)) == 1 })
	other.write("scrape.token", string(token))
	stranger := other.scrapedBy(other.listen, host, fields("other.pem")...)
	eventually(t, "no scrape with another CA", up(stranger, "0"))
	if out := s.must("admin", "scraper", "list"); !strings.Contains(out, "prometheus") ||
		strings.Contains(out, string(bytes.TrimSpace(token))) {
		t.Errorf("list: %s", out)
	}
	p.stop()
	eventually(t, "no scrape of a stopped daemon", up(db, "0"))
	p = s.serve()
	eventually(t, "a scrape after the restart", up(db, "1"))
	s.must("admin", "scraper", "remove", "prometheus")
	eventually(t, "no scrape after the removal", up(db, "0"))
	p.stop()
}

// queries returns the queries of the dashboard, of the records, and for each alert the series and
// records that the alert reads: the alert itself gives data only while it fires.
func queries(t *testing.T, prometheus, dashboard string) (all []string) {
	t.Helper()
	var shown struct {
		Panels []struct{ Targets []struct{ Expr string } }
	}
	if err := json.Unmarshal(must(os.ReadFile(dashboard))(t), &shown); err != nil {
		t.Fatal(err)
	}
	for _, p := range shown.Panels {
		for _, q := range p.Targets {
			all = append(all, strings.ReplaceAll(q.Expr, "$instance", ".*"))
		}
	}
	var rules struct {
		Data struct {
			Groups []struct {
				Rules []struct{ Type, Name, Query string }
			}
		}
	}
	if err := json.Unmarshal([]byte(must(get(t, "http://"+prometheus+"/api/v1/rules"))(t)), &rules); err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile(`\b(countersign[_:][a-z0-9_:]+|up)\b`)
	for _, g := range rules.Data.Groups {
		for _, r := range g.Rules {
			if r.Type == "recording" {
				all = append(all, r.Name)
			} else {
				all = append(all, names.FindAllString(r.Query, -1)...)
			}
		}
	}
	slices.Sort(all)
	if all = slices.Compact(all); len(all) < 60 {
		t.Fatalf("%d queries", len(all))
	}
	return all
}
