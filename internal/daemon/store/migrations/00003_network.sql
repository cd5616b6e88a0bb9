-- +goose Up

-- What the VM may reach and what of it is published, see netwire.Network. No constraint on
-- what is in it: a value that cannot be read must cost one VM its network, not all of them.
ALTER TABLE vms ADD COLUMN network TEXT NOT NULL DEFAULT '{"preset":"internet"}';
