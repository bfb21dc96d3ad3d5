package image_test

import (
	"os"
	"strings"
	"testing"
	"time"
)

// TestReset destroys an appliance under approval, and another one by the menu. The machine comes
// back as another appliance, and a copy of the disk of before stays locked.
func TestReset(t *testing.T) {
	long(t)
	for name, reset := range map[string]func(v *installed, ann *operator, appliance string){
		"under approval": func(v *installed, ann *operator, appliance string) {
			out, err := ann.try("admin", "machine", "reset", "another")
			if err == nil || !strings.Contains(out, appliance) {
				t.Errorf("%v %s", err, out)
			}
			ann.tool("admin", "machine", "reset", appliance)
		},
		"by the menu": func(v *installed, _ *operator, appliance string) {
			v.typeLine("f")
			v.see("Type " + appliance + " to destroy it")
			v.typeLine("yes")
			v.see("nothing was changed")
			v.typeLine("f")
			v.eventually(bootTime, "the question comes again", func() bool {
				return strings.Count(v.log.String(), "to destroy it") == 2
			})
			v.typeLine(appliance)
		},
	} {
		t.Run(name, func(t *testing.T) {
			v := install(t)
			copied := v.vm.copy(t)
			v.vm.t = t
			v.vm.start()
			v.ready()
			v.see("Noise key " + v.noise)
			ann := v.operator()
			log := strings.Fields(ann.tool("admin", "audit", "key"))[0] // NAME/EPOCH+HASH+KEY
			appliance := log[:strings.LastIndex(log[:strings.Index(log, "+")], "/")]
			reset(v, ann, appliance)
			v.eventually(bootTime, "the machine goes", func() bool { return !v.isReady() })
			v.ready()
			v.operator() // enrolled again by the settings of the ESP
			v.eventually(bootTime, "the console shows another key", func() bool {
				text := v.log.String()
				return strings.LastIndex(text, "Noise key") > strings.LastIndex(text, v.noise)
			})
			v.off()

			must(0, os.RemoveAll(copied.path(tpmDir)))(t)
			output(t, "cp", "-r", v.path(tpmDir), copied.path(tpmDir))
			copied.start()
			copied.never("the seal of the disk is an old copy")
			copied.kill()

			// The power goes in the midst of a reset: the next boot goes on.
			output(t, "sfdisk", "--quiet", "--part-label", copied.path(diskFile), "2", "countersign-going")
			copied.start()
			copied.ready()
			copied.operator()
		})
	}
}

// TestCutFirstBoot cuts the power again and again while an appliance is made. In the end the
// appliance is whole, and has the holders of its settings.
func TestCutFirstBoot(t *testing.T) {
	long(t)
	m := must(theMaker())(t)
	v := newVM(t, m.image(t, nil), m.settings(t)+m.holders(t))
	for i := range 6 {
		v.start()
		v.see("Countersign 0.2.0")                            // the console is up, and the appliance is being made
		time.Sleep(time.Duration(i) * 700 * time.Millisecond) // no condition: the cut comes at any time
		v.kill()
	}
	v.start()
	v.ready()
	ann := v.operator()
	if holders := ann.tool("admin", "holders", "show"); !strings.Contains(holders, "carol") {
		t.Error(holders)
	}
	signs(t, ann.shop(), ann)
	v.off()
}

// TestMenu makes the link of the first administrator, changes the network and the time servers, and
// restarts the machine, at the console.
func TestMenu(t *testing.T) {
	long(t)
	m := must(theMaker())(t)
	v := newVM(t, m.image(t, nil), "")
	v.start()
	v.ready()
	v.see("operators none yet")
	v.typeLine("l")
	v.see("Name of the first administrator")
	v.typeLine("ann")
	v.see("https://localhost:")
	v.see("/enrol#")
	v.typeLine("")
	v.typeLine("x\x1b[31m")
	v.see("this is none of the letters")
	v.typeLine("n")
	v.see("Addresses with their networks")
	v.typeLine("10.0.2.99")
	v.see("Gateway")
	v.typeLine("-")
	v.see("Name servers")
	v.typeLine("-")
	v.see(`"10.0.2.99" is no address with its network`)
	v.typeLine("n")
	for _, answer := range []string{"10.0.2.99/24", "10.0.2.2", "-"} {
		v.typeLine(answer)
	}
	v.see("Type yes to put these settings in force")
	v.typeLine("yes")
	v.see("network 10.0.2.99/24")
	v.typeLine("t")
	v.see("Names of time servers with NTS")
	v.typeLine("192.0.2.1")
	v.see(`"192.0.2.1" is no host name`)
	v.typeLine("t")
	v.eventually(bootTime, "the question comes again", func() bool {
		return strings.Count(v.log.String(), "Names of time servers with NTS") == 2
	})
	v.typeLine("time.example.com")
	v.see(`time = ['time.example.com']`)
	v.typeLine("yes")
	v.typeLine("r")
	v.see("Type yes to reboot")
	v.typeLine("yes")
	v.eventually(bootTime, "the machine comes back with its settings", func() bool {
		_, after, again := strings.Cut(v.log.String(), "reboot: Restarting system")
		return again && strings.Contains(after, "10.0.2.99/24")
	})
	v.typeLine("t")
	v.see("Names of time servers with NTS [time.example.com]")
	v.typeLine("")
	v.off()
}
