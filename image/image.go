// Package image makes the bootable images of the appliance: one signed unified kernel image (UKI)
// with systemd and the whole root in its initramfs, and a disk that boots it. Begin reading at
// Build. docs/DESIGN.md, "The image", says why.
package image
