package hsm

import (
	"context"
	"fmt"

	"countersign/internal/keystore"
	"countersign/internal/secret"

	"github.com/miekg/pkcs11"
)

// InitToken makes a new token in the first slot with an uninitialised token. The label is the URI's
// token attribute, the user PIN is the one in Config.PINFile, and the PIN of the security officer
// (SO) is read from soPINFile. InitToken changes no initialised token, with one exception: a token
// matching the URI and without a user PIN gets the user PIN. Another token that matches is
// keystore.ErrExists. InitToken must not run beside an open Store. If ctx ends first, the calls
// into the module go on in the background, and the process should exit.
func InitToken(ctx context.Context, c Config, soPINFile string) error {
	done := make(chan error, 1)
	go func() { done <- initToken(c, soPINFile) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("hsm: new token: %w", ctx.Err())
	}
}

func initToken(c Config, soPINFile string) error {
	s, err := load(c)
	if err != nil {
		return err
	}
	defer s.unload()
	uri, module := s.uri, s.module
	pin, err := readPIN(s.pinFile)
	if err != nil {
		return fmt.Errorf("hsm: new token: %w", err)
	}
	defer pin.Wipe()
	soPIN, err := readPIN(soPINFile)
	if err != nil {
		return fmt.Errorf("hsm: new token: SO %w", err)
	}
	defer soPIN.Wipe()
	if err := s.direct.initialize(c.Parameters); err != nil {
		return err
	}
	defer module.Finalize()
	slots, err := module.GetSlotList(true)
	if err != nil {
		return deviceError("C_GetSlotList", err)
	}
	var empty []uint
	for _, slot := range slots {
		slotInfo, err := module.GetSlotInfo(slot)
		if err != nil {
			return deviceError("C_GetSlotInfo", err)
		}
		info, err := module.GetTokenInfo(slot)
		switch {
		case err != nil:
			return deviceError("C_GetTokenInfo", err)
		case info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0:
			empty = append(empty, slot)
		case !uri.matches(slot, slotInfo, info):
		case info.Flags&pkcs11.CKF_USER_PIN_INITIALIZED == 0:
			return setPIN(module, uri, soPIN, pin) // an earlier InitToken was interrupted before setPIN
		default:
			return fmt.Errorf("hsm: new token: a token matches %q already: %w", uri.text, keystore.ErrExists)
		}
	}
	label := uri.attrs["token"]
	if label == "" || len(label) > 32 || len(uri.attrs) > 1 || uri.slotID != nil {
		return fmt.Errorf("hsm: new token: the URI must have a token attribute of 1 to 32 bytes, for the label, " +
			"and no attribute but token")
	}
	if len(empty) == 0 {
		return fmt.Errorf("hsm: new token: none of the %d slots holds an empty token", len(slots))
	}
	if err := module.InitToken(empty[0], string(soPIN.Expose()), label); err != nil {
		return deviceError("C_InitToken", err)
	}
	return setPIN(module, uri, soPIN, pin)
}

// setPIN sets the user PIN of a new token. setPIN searches the slot again, because C_InitToken may
// have moved the token to another slot.
func setPIN(module *pkcs11.Ctx, uri tokenURI, soPIN, pin secret.Bytes) error {
	slot, _, err := findSlot(module, uri)
	if err != nil {
		return err
	}
	session, err := module.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return deviceError("C_OpenSession", err)
	}
	if err := module.Login(session, pkcs11.CKU_SO, string(soPIN.Expose())); err != nil {
		return deviceError("C_Login (SO)", err)
	}
	if err := module.InitPIN(session, string(pin.Expose())); err != nil {
		return deviceError("C_InitPIN", err)
	}
	return nil
}
