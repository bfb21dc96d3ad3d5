package admin

import (
	"fmt"
	"net/http"
	"strconv"
	"time"

	"countersign/admin/api"
	"countersign/appliance"

	"github.com/labstack/echo/v4"
)

func policyDoc(v appliance.PolicyVersion) api.Policy {
	return api.Policy{Version: v.Version, SHA256: v.Hash, Activated: v.Activated.Unix(), Text: v.Text}
}

func (s server) policies(c echo.Context) error {
	all, err := s.app.Policies()
	if err != nil {
		return err
	}
	docs := []api.Policy{}
	for _, v := range all {
		v.Text = ""
		docs = append(docs, policyDoc(v))
	}
	return c.JSON(http.StatusOK, docs)
}

func (s server) policy(c echo.Context) error {
	all, err := s.app.Policies()
	if err != nil {
		return err
	}
	for _, v := range all {
		if strconv.FormatUint(v.Version, 10) == c.Param("version") {
			return c.JSON(http.StatusOK, policyDoc(v))
		}
	}
	return fmt.Errorf("policy version %q: %w", c.Param("version"), appliance.ErrNotFound)
}

func (s server) reloadPolicy(c echo.Context) error {
	p, err := s.loadPolicy()
	if err != nil {
		return fmt.Errorf("%w: %w", appliance.ErrInvalid, err)
	}
	version, changed, err := s.app.Activate(c.Request().Context(), caller(c), p)
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, api.Reloaded{Version: version, Changed: changed})
}

func (s server) decision(c echo.Context) error {
	event, err := strconv.ParseUint(c.Param("event"), 10, 64)
	if err != nil {
		return fmt.Errorf("event: %w: it must be the number of an event", appliance.ErrInvalid)
	}
	d, err := s.app.Decision(event)
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, api.Decision{Event: d.Event, Record: string(d.Record)})
}

func (s server) decisions(c echo.Context) error {
	var from uint64
	var since int64
	var err error
	if v := c.QueryParam("from"); v != "" {
		if from, err = strconv.ParseUint(v, 10, 64); err != nil {
			return fmt.Errorf("from: %w: it must be the number of an event", appliance.ErrInvalid)
		}
	}
	if v := c.QueryParam("since"); v != "" {
		if since, err = strconv.ParseInt(v, 10, 64); err != nil {
			return fmt.Errorf("since: %w: it must be Unix milliseconds", appliance.ErrInvalid)
		}
	}
	docs := []api.Decision{}
	if err := s.app.Decisions(from, time.UnixMilli(since), func(d appliance.Decision) bool {
		docs = append(docs, api.Decision{Event: d.Event, Record: string(d.Record)})
		return len(docs) < maxEvents
	}); err != nil {
		return err
	}
	return c.JSON(http.StatusOK, docs)
}

func (s server) suspendPeer(c echo.Context) error {
	if err := s.app.SuspendPeer(c.Request().Context(), caller(c), c.Param("name")); err != nil {
		return err
	}
	return c.NoContent(http.StatusNoContent)
}

func (s server) resumePeer(c echo.Context) error {
	if err := s.app.ResumePeer(c.Request().Context(), caller(c), c.Param("name")); err != nil {
		return err
	}
	return c.NoContent(http.StatusNoContent)
}
