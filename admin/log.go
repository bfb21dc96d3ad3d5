package admin

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"strconv"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/appliance"
	"countersign/audit"
	"countersign/ledger"

	"github.com/labstack/echo/v4"
)

// maxReceipts bounds the receipts in one answer.
const maxReceipts = 1000

func (s server) log(c echo.Context) error {
	log, epoch, err := s.app.Log()
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, api.Log{Epoch: epoch, VerifierKey: log.VerifierKey(epoch)})
}

func (s server) endEpoch(c echo.Context) error {
	if _, err := s.app.EndEpoch(c.Request().Context(), caller(c)); err != nil {
		return err
	}
	return s.log(c)
}

// logFile gives a file of the log's static form. Only a checkpoint of the present epoch ever changes.
func (s server) logFile(c echo.Context) error {
	path := strings.TrimPrefix(c.Request().URL.Path, "/")
	b, err := s.app.LogFile(c.Request().Context(), path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w", path, appliance.ErrNotFound)
	} else if err != nil {
		return err
	}
	kind, cache := "application/octet-stream", "max-age=31536000, immutable"
	if strings.HasSuffix(path, "checkpoint") {
		kind, cache = "text/plain; charset=utf-8", "no-cache"
	}
	c.Response().Header().Set("Cache-Control", cache)
	return c.Blob(http.StatusOK, kind, b)
}

func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

func (s server) retention(c echo.Context) error {
	epochs, before, err := s.app.Preview()
	if err != nil {
		return err
	}
	doc := api.Retention{Epochs: []api.Epoch{}, ReceiptsBefore: before.Unix()}
	for _, e := range epochs {
		doc.Epochs = append(doc.Epochs, api.Epoch{
			Epoch: e.Number, First: e.First, Size: e.Size, Begun: e.Begun / 1000, Ended: e.Ended / 1000, Due: unix(e.Due), Dropped: e.Dropping / 1000,
			Hold: e.Hold, Checkpoint: e.Signed,
		})
	}
	return c.JSON(http.StatusOK, doc)
}

// setHold reads an epoch and a reason.
func (s server) setHold(c echo.Context, set func(context.Context, audit.Actor, uint32, string) error) error {
	epoch, err := strconv.ParseUint(c.Param("epoch"), 10, 32)
	if err != nil {
		return fmt.Errorf("epoch: %w: it must be a number", appliance.ErrInvalid)
	}
	var r api.Hold
	if err := decode(c, &r); err != nil {
		return err
	}
	if err := set(c.Request().Context(), caller(c), uint32(epoch), r.Reason); err != nil {
		return err
	}
	return c.NoContent(http.StatusNoContent)
}

func (s server) hold(c echo.Context) error { return s.setHold(c, s.app.Hold) }

func (s server) release(c echo.Context) error { return s.setHold(c, s.app.Release) }

func receiptDoc(r ledger.Receipt) api.Receipt {
	return api.Receipt{ID: hex.EncodeToString(r.ID[:]), TimeMS: r.TimeMS, Commitment: hex.EncodeToString(r.Commitment), Method: r.Method, Status: r.Status, Event: r.Event}
}

func (s server) receipt(c echo.Context) error {
	r, err := s.app.Receipt(c.Param("id"))
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, receiptDoc(r))
}

func (s server) receipts(c echo.Context) error {
	numbers := map[string]int64{"from": 0, "to": 0, "limit": maxReceipts}
	for name := range numbers {
		if v := c.QueryParam(name); v != "" {
			n, err := strconv.ParseInt(v, 10, 64)
			if err != nil || n < 0 {
				return fmt.Errorf("%s: %w: it must be a number", name, appliance.ErrInvalid)
			}
			numbers[name] = n
		}
	}
	if n := numbers["limit"]; n < 1 || n > maxReceipts {
		return fmt.Errorf("limit: %w: it must be 1 to %d", appliance.ErrInvalid, maxReceipts)
	}
	found, err := s.app.Receipts(numbers["from"], numbers["to"], c.QueryParam("after"), int(numbers["limit"]))
	if err != nil {
		return err
	}
	docs := []api.Receipt{}
	for _, r := range found {
		docs = append(docs, receiptDoc(r))
	}
	return c.JSON(http.StatusOK, docs)
}

func (s server) ledger(c echo.Context) error {
	st, err := s.app.LedgerStats(c.Request().Context())
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, api.Ledger{
		FileSize: st.FileSize, FreeBytes: st.FreeBytes, Events: st.Events, FirstEvent: st.FirstEvent, Epochs: st.Epochs, Nonces: st.Nonces, MaxNonces: st.MaxNonces,
		Time: st.Time.Unix(), BehindClock: st.BehindClock, Trouble: st.Trouble,
	})
}

func (s server) compact(c echo.Context) error {
	// It takes as long as it takes, and who asked gets to know how it ended.
	before, after, took, err := s.app.Compact(context.WithoutCancel(c.Request().Context()), caller(c))
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, api.Compacted{Before: before, After: after, TookMS: took.Milliseconds()})
}

func (s server) acceptTime(c echo.Context) error {
	if err := s.app.AcceptTime(c.Request().Context(), caller(c)); err != nil {
		return err
	}
	return c.NoContent(http.StatusNoContent)
}
