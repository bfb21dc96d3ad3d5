package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"countersign/internal/durable"
)

// Files of the network, below /run: they are made anew at each boot and at each change of the
// settings.
const (
	networkdFile = "/run/systemd/network/10-countersign.network"
	nftablesFile = runFolder + "/nftables.conf"
	chronyFile   = runFolder + "/chrony.conf"
	timeCAFile   = runFolder + "/time-ca.pem"
	resolvFile   = runFolder + "/resolv.conf"
	keysUnitFile = "/run/systemd/system/countersignd-keys@.service.d/hsm.conf"
)

// CheckNetwork returns an error for settings that the firewall would refuse.
func CheckNetwork(ctx context.Context, s Settings) error {
	if err := run(ctx, []byte(s.Nftables()), "nft", "--check", "--file", "-"); err != nil {
		return fmt.Errorf("the firewall: %w", err)
	}
	return nil
}

// ApplyNetwork writes the configuration of network, firewall and clock, and loads the firewall.
func ApplyNetwork(ctx context.Context, s Settings) error {
	for path, text := range map[string]string{
		networkdFile: s.Networkd(), nftablesFile: s.Nftables(), chronyFile: s.Chrony(),
		timeCAFile: s.TimeCA, keysUnitFile: s.KeysUnit(),
	} {
		if text == "" {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := durable.Replace(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	if err := run(ctx, nil, "nft", "--file", nftablesFile); err != nil {
		return fmt.Errorf("the firewall: %w", err)
	}
	if s.KeysUnit() != "" {
		if err := run(ctx, nil, "systemctl", "daemon-reload"); err != nil {
			return err
		}
	}
	return WriteResolv(s)
}

// LoadSettings returns the settings in force. Without a state, the machine has an address by DHCP,
// for the console alone.
func LoadSettings() (Settings, error) {
	s, err := readSettings(settingsFile)
	if errors.Is(err, fs.ErrNotExist) {
		return Settings{}, nil
	}
	return s, err
}

// WriteResolv writes the name servers of the settings, or of DHCP, for programs that ask the DNS.
func WriteResolv(s Settings) error {
	servers := s.DNS
	if len(servers) == 0 {
		leased, _ := os.ReadFile("/run/systemd/netif/state")
		for line := range strings.Lines(string(leased)) {
			if list, is := strings.CutPrefix(strings.TrimSpace(line), "DNS="); is {
				servers = strings.Fields(list)
			}
		}
	}
	var b strings.Builder
	for _, server := range slices.Compact(servers) {
		if isIP(server) == nil {
			fmt.Fprintf(&b, "nameserver %s\n", server)
		}
	}
	return durable.Replace(resolvFile, []byte(b.String()), 0o644)
}
