-- +goose Up

-- Times are nanoseconds since 1970 in UTC, 0 for none. Sizes are bytes. Lists are JSON.

CREATE TABLE kernels (
    name       TEXT    PRIMARY KEY CHECK (name <> ''),
    version    TEXT    NOT NULL,
    source     TEXT    NOT NULL,
    recipe     TEXT    NOT NULL,
    size       INTEGER NOT NULL,
    modules    TEXT    NOT NULL CHECK (json_type(modules) = 'array'),
    created_at INTEGER NOT NULL
) STRICT;

-- An image without a name was replaced by a newer one while VMs were made from it.
-- Its kernel is a name only: an image may come before its kernel.
CREATE TABLE images (
    id         TEXT    PRIMARY KEY CHECK (id <> ''),
    name       TEXT    NOT NULL,
    kernel     TEXT    NOT NULL,
    size       INTEGER NOT NULL,
    managed    INTEGER NOT NULL CHECK (managed IN (0, 1)),
    source     TEXT    NOT NULL,
    recipe     TEXT    NOT NULL,
    own_user   INTEGER NOT NULL CHECK (own_user IN (0, 1)),
    created_at INTEGER NOT NULL
) STRICT;

CREATE UNIQUE INDEX images_name ON images (name) WHERE name <> '';

CREATE TABLE vms (
    id                TEXT    PRIMARY KEY CHECK (id <> ''),
    name              TEXT    NOT NULL UNIQUE CHECK (name <> ''),
    state             TEXT    NOT NULL CHECK (state IN ('creating', 'stopped', 'starting', 'running', 'stopping', 'deleting', 'failed')),
    slot              INTEGER NOT NULL UNIQUE CHECK (slot >= 1),
    image             TEXT    NOT NULL REFERENCES images (id) ON DELETE RESTRICT,
    kernel            TEXT    NOT NULL REFERENCES kernels (name) ON DELETE RESTRICT,
    cpus              INTEGER NOT NULL CHECK (cpus >= 1),
    memory            INTEGER NOT NULL CHECK (memory > 0),
    disk              INTEGER NOT NULL CHECK (disk > 0),
    disk_driver       TEXT    NOT NULL,
    machine_id        TEXT    NOT NULL,
    user_name         TEXT    NOT NULL,
    user_uid          INTEGER NOT NULL,
    user_gid          INTEGER NOT NULL,
    owner             INTEGER NOT NULL,
    remove_on_release INTEGER NOT NULL CHECK (remove_on_release IN (0, 1)),
    repository        TEXT    NOT NULL,
    created_at        INTEGER NOT NULL,
    last_error        TEXT    NOT NULL,
    ended             TEXT    NOT NULL
) STRICT;

CREATE UNIQUE INDEX vms_repository ON vms (repository) WHERE repository <> '';
CREATE INDEX vms_image ON vms (image);
CREATE INDEX vms_kernel ON vms (kernel);

CREATE TABLE workspaces (
    vm          TEXT    PRIMARY KEY REFERENCES vms (id) ON DELETE CASCADE,
    host_path   TEXT    NOT NULL CHECK (host_path <> ''),
    guest_path  TEXT    NOT NULL,
    head        TEXT    NOT NULL,
    base_tree   TEXT    NOT NULL,
    prepared_at INTEGER NOT NULL,
    changes     INTEGER NOT NULL,
    changes_at  INTEGER NOT NULL
) STRICT;
