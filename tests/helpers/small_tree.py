"""A tree with playbooks of three lines, for tests of what runs them."""

PLAYBOOK = """
- hosts: all
  gather_facts: false
  tasks:
    - name: Say it
      ansible.builtin.debug: {{msg: "{said}"}}
    - name: Judge it
      ansible.builtin.assert: {{that: {good}, fail_msg: not good}}
"""
