package daemon

import (
	"cmp"
	"context"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/daemon/image"
	"banger/internal/daemon/store"
)

type imageService struct{ d *Daemon }

func (s imageService) List(ctx context.Context, _ *bangerv1.ListImagesRequest) (*bangerv1.ListImagesResponse, error) {
	images, err := s.d.images.List(ctx)
	if err != nil {
		return nil, err
	}
	res := &bangerv1.ListImagesResponse{}
	for _, i := range images {
		res.Images = append(res.Images, imageMessage(i.Image, i.Listed))
	}
	return res, nil
}

func (s imageService) Pull(ctx context.Context, req *bangerv1.PullImageRequest) (*bangerv1.Operation, error) {
	c, err := loadConfig()
	if err != nil {
		return nil, err
	}
	name := cmp.Or(req.Name, c.Image)
	return s.d.begin("pull", name, func(ctx context.Context, op *operation) (proto.Message, error) {
		img, err := s.d.images.Pull(ctx, name, req.Force, op)
		if err != nil {
			return nil, err
		}
		s.d.prune(context.WithoutCancel(ctx))
		return imageMessage(img, image.Listed{}), nil
	})
}

func imageMessage(i store.Image, l image.Listed) *bangerv1.Image {
	m := &bangerv1.Image{
		Id: i.ID, Name: i.Name, Kernel: i.Kernel, Size: i.Size, Managed: i.Managed, Source: i.Source,
		InUse: int32(l.InUse), Available: l.Available,
	}
	if !i.CreatedAt.IsZero() {
		m.CreatedAt = timestamppb.New(i.CreatedAt)
	}
	return m
}

type kernelService struct{ d *Daemon }

func (s kernelService) List(ctx context.Context, _ *bangerv1.ListKernelsRequest) (*bangerv1.ListKernelsResponse, error) {
	kernels, err := s.d.images.ListKernels(ctx)
	if err != nil {
		return nil, err
	}
	res := &bangerv1.ListKernelsResponse{}
	for _, k := range kernels {
		res.Kernels = append(res.Kernels, kernelMessage(k.Kernel, k.Listed))
	}
	return res, nil
}

func (s kernelService) Pull(ctx context.Context, req *bangerv1.PullKernelRequest) (*bangerv1.Operation, error) {
	c, err := loadConfig()
	if err != nil {
		return nil, err
	}
	name := cmp.Or(req.Name, c.Kernel)
	return s.d.begin("pull", name, func(ctx context.Context, op *operation) (proto.Message, error) {
		k, err := s.d.images.PullKernel(ctx, name, req.Force, op)
		if err != nil {
			return nil, err
		}
		return kernelMessage(k, image.Listed{}), nil
	})
}

func kernelMessage(k store.Kernel, l image.Listed) *bangerv1.Kernel {
	m := &bangerv1.Kernel{
		Name: k.Name, Version: k.Version, Size: k.Size, Source: k.Source,
		InUse: int32(l.InUse), Available: l.Available,
	}
	if !k.CreatedAt.IsZero() {
		m.CreatedAt = timestamppb.New(k.CreatedAt)
	}
	return m
}
