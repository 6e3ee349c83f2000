"""Devices: runs a bundle on the device, or on an emulation of it, before it ships.

    with open_device("cortex-a76") as device:
        outcome = device.run(Job(bundle=path, feeds=samples))

A job is a folder with the bundle and its feeds; what runs it on the other side is small:
``guest.py`` with the shipped runtime wherever there is Python, ``hosts/`` elsewhere.
"""
