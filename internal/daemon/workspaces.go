package daemon

import (
	"context"
	"io"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/daemon/workspace"
)

type workspaceService struct{ d *Daemon }

func (s workspaceService) Find(ctx context.Context, req *bangerv1.FindWorkspaceRequest) (*bangerv1.FindWorkspaceResponse, error) {
	repo, err := s.d.workspaces.Locate(ctx, req.Path)
	if err != nil {
		return nil, err
	}
	res := &bangerv1.FindWorkspaceResponse{Repository: repo.Path, Prefix: repo.Prefix}
	rec, ok, err := s.d.vms.ByRepository(ctx, repo.Path)
	if err != nil || !ok {
		return res, err
	}
	view, err := s.d.vms.Show(ctx, rec.ID)
	if err != nil {
		return nil, err
	}
	res.Vm = vmMessage(view)
	return res, nil
}

func (s workspaceService) Prepare(ctx context.Context, req *bangerv1.PrepareWorkspaceRequest) (*bangerv1.Operation, error) {
	rec, err := s.d.vms.Resolve(ctx, req.Ref, true)
	if err != nil {
		return nil, err
	}
	return s.d.begin("prepare", rec.Name, func(ctx context.Context, op *operation) (proto.Message, error) {
		p, err := s.d.workspaces.Prepare(ctx, rec.ID, req.Repository, req.IncludeUntracked, op)
		if err != nil {
			return nil, err
		}
		return &bangerv1.Prepared{
			Workspace: workspaceMessage(p.Workspace), HeadShort: p.HeadShort, Changed: int32(p.Changed),
			SkippedUntracked: int32(p.SkippedUntracked), Updated: int32(p.Updated), Kept: p.Kept, Notes: p.Notes,
		}, nil
	})
}

func (s workspaceService) Export(ctx context.Context, req *bangerv1.ExportWorkspaceRequest, stream *connect.ServerStream[bangerv1.ExportChunk]) error {
	rec, err := s.d.vms.Resolve(ctx, req.Ref, true)
	if err != nil {
		return err
	}
	detach, err := s.d.attach()
	if err != nil {
		return err
	}
	defer detach()
	return s.d.workspaces.Export(ctx, rec.ID, workspace.ExportOptions{FromHead: req.FromHead}, func(m workspace.Meta) (io.Writer, error) {
		meta := &bangerv1.ExportMeta{HostPath: m.HostPath, Head: m.Head, Files: int32(m.Files), Notes: m.Notes}
		return chunkWriter{stream}, stream.Send(&bangerv1.ExportChunk{Meta: meta})
	})
}

// chunkWriter sends what is written as chunks of the stream.
type chunkWriter struct {
	stream *connect.ServerStream[bangerv1.ExportChunk]
}

func (w chunkWriter) Write(p []byte) (int, error) {
	const most = 256 << 10
	for sent := 0; sent < len(p); sent += most {
		if err := w.stream.Send(&bangerv1.ExportChunk{Patch: p[sent:min(sent+most, len(p))]}); err != nil {
			return sent, err
		}
	}
	return len(p), nil
}
