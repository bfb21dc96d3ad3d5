package hsm

import "time"

// LogOut ends the login of all sessions of the process behind the store's back.
func (s *Store) LogOut() {
	held := <-s.slots
	s.using.RLock()
	if held.handle == 0 {
		held.handle, _ = s.module.OpenSession(s.slot, 4|2)
		held.generation = s.generation
	}
	s.module.Logout(held.handle)
	s.using.RUnlock()
	s.slots <- held
	s.recovering.Lock()
	s.nextRecover = time.Time{} // a test does not wait for the pause between attempts
	s.recovering.Unlock()
}

// IdleSlots returns how many of the operations that may be in flight are not.
func (s *Store) IdleSlots() int { return len(s.slots) }
